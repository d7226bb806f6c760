"""Writes checkpoints while the training goes on.

A thread reads the tensors from the device while the next step computes its gradients. Only the
optimizer's update changes the tensors, and it waits until all of them have been read. So a save
takes no memory but one chunk of a tensor, and it takes time only where the disk is slower than a
forward and a backward.
"""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from fitune.distributed.checkpoint import ShardedTensors
from fitune.machine.out_of_memory import said_of, try_twice
from fitune.machine.threads import start_thread
from fitune.model.save import link_model, write_files
from fitune.optimizers.table import OPTIMIZERS
from fitune.run.directory import RunDirectory
from fitune.run.files import sync_directory, write_json
from fitune.run.patient_files import PatientFiles
from fitune.step.assemble import Setup
from fitune.training.checkpoint.content import (
    WholeTensors,
    device_of,
    random_state,
    sharded_tensors,
    state_json,
)
from fitune.training.checkpoint.files import (
    NUM_KEPT,
    SCHEMA,
    SPARE_BYTES,
    Json,
    check_free_space,
    checkpoint_path,
    flush,
    put_in_place,
    remove_old,
    truncated_logs,
    write_manifest,
)
from fitune.training.state import RunState
from fitune.units import format_bytes


class CheckpointWriter:
    """Saves a run's checkpoints in a thread, one at a time.

    A save that fails leaves the earlier checkpoints as they are; `failure` reports it.

    files: the small files of the model's directory, from `model_files`.
    facts: the run's identity and conditions.
    logs: writes the run's logs, which must be on the disk before a checkpoint counts.
    writes: False in all processes of a distributed run but the first.
    """

    def __init__(
        self,
        run: RunDirectory,
        setup: Setup,
        *,
        files: Mapping[str, bytes],
        facts: Mapping[str, Json],
        logs: PatientFiles,
        writes: bool = True,
    ) -> None:
        self._run, self._setup, self._files, self._facts = run, setup, files, facts
        self._logs, self._writes = logs, writes
        #: the step of the last save if that failed
        self.failed_step: int | None = None
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._is_read = threading.Event()
        self._is_read.set()
        self._hook = setup.optimizer.register_step_pre_hook(lambda *_: self._wait_until_read())

    def save(self, state: RunState, *, memory_model: Json | None = None) -> None:
        """Begin to save the run as it is now, after waiting for an earlier save.

        If `state.best_step` is the present step, the saved model becomes best/ too.
        """
        shards = self._setup.settings.shards
        if not self._writes and shards is None:
            return
        self.wait()
        self.failed_step = None
        if shards is not None:
            sharded = sharded_tensors(self._setup, shards)
            self._write(state, sharded, self._content(state, sharded, memory_model))
            return
        try:
            tensors = try_twice(
                lambda: WholeTensors.of(self._setup),
                device=device_of(self._setup.model),
                what="the copy of the model's buffers",
            )
            content = self._content(state, tensors, memory_model)
        except Exception as error:
            self._fail(state, error)
            return
        self._is_read.clear()
        thread = threading.Thread(
            target=self._write,
            args=(state, tensors, content),
            name="fitune-checkpoint",
            daemon=True,
        )
        if start_thread(thread):
            self._thread = thread
        else:  # no thread could be started, so the training waits for this save
            self._write(state, tensors, content)

    def failure(self) -> str | None:
        """Return why the last finished save failed; each failure is returned once."""
        failure, self._failure = self._failure, None
        return failure

    def wait(self) -> None:
        """Wait until nothing is being saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        self.wait()
        self._hook.remove()

    def _content(
        self, state: RunState, tensors: WholeTensors | ShardedTensors, memory_model: Json | None
    ) -> Json:
        scaler = self._setup.scaler
        return {
            "schema": SCHEMA,
            "state": state_json(state),
            "random": random_state(device_of(self._setup.model)),
            "scaler": None if scaler is None else scaler.state_dict(),
            "optimizer": tensors.optimizer_scalars,
            "memory_model": memory_model,
            "log_bytes": {log.name: self._logs.size(log) for log in truncated_logs(self._run)},
            **self._facts,
        }

    def _wait_until_read(self) -> None:
        self._is_read.wait()

    def _write(
        self, state: RunState, tensors: WholeTensors | ShardedTensors, content: Json
    ) -> None:
        final = checkpoint_path(self._run, state.step)
        new = final.with_name(f".{final.name}")

        def begin() -> None:
            # the small files are written three times: last/ and best/ hold copies of them
            file_bytes = 3 * sum(map(len, self._files.values()))
            check_free_space(self._run.checkpoints, tensors.num_bytes + file_bytes)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()

        try:
            hashes = tensors.write(new, begin=begin)
            self._is_read.set()
            if not self._writes:
                return
            write_files(new / "model", self._files)
            write_json(new / "state.json", content)
            self._logs.flush()
            for log in truncated_logs(self._run):
                flush(log)
            write_manifest(new, hashes)
            put_in_place(new, final)
            sync_directory(final.parent)
            link_model(final / "model", self._run.last)
            if state.best_step == state.step:
                link_model(final / "model", self._run.best)
            remove_old(self._run, state)
        # any error: an exception that leaves a thread would go unnoticed
        except Exception as error:
            self._fail(state, error)
            if self._writes:
                shutil.rmtree(new, ignore_errors=True)
        finally:
            self._is_read.set()

    def _fail(self, state: RunState, error: Exception) -> None:
        self.failed_step = state.step
        self._failure = f"step {state.step} could not be saved: {said_of(error)}"


def check_disk(output: Path, setup: Setup, optimizer_name: str) -> str | None:
    """Return a warning if the disk of `output` has no space for all checkpoints of a run.

    `output` need not exist yet. Raises RunDirectoryError if not even one checkpoint fits.
    """
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    one_bytes = _planned_bytes(setup, optimizer_name)
    check_free_space(place, one_bytes)
    free_bytes, most_bytes = shutil.disk_usage(place).free, one_bytes * (NUM_KEPT + 2)
    if most_bytes + SPARE_BYTES <= free_bytes:
        return None
    return (
        f"checkpoints will need {format_bytes(most_bytes)} ({NUM_KEPT} last ones, the best one, one being written) and "
        f"{output} has {format_bytes(free_bytes)} free: what does not fit is not saved, and said"
    )


def _planned_bytes(setup: Setup, optimizer_name: str) -> int:
    """Return the size of one checkpoint, with the optimizer's state even before it is allocated."""
    shards = setup.settings.shards
    tensors = WholeTensors.of(setup) if shards is None else sharded_tensors(setup, shards)
    if isinstance(tensors, WholeTensors) and tensors.optimizer:
        return tensors.num_bytes
    trained_bytes = sum(
        parameter.nbytes for parameter in setup.model.parameters() if parameter.requires_grad
    )
    return tensors.num_bytes + int(trained_bytes * OPTIMIZERS[optimizer_name].state_share)
