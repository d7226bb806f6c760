"""A commit on the disk, and back: all that a run needs to go on bit for bit.

    checkpoints/step-00000120/
        model/                  a transformers directory (of adapters: peft's); last/ and best/ are links to its files
        weights.safetensors     trained parameters and buffers by the model's own names, where model/ has other ones
        optimizer.safetensors   the optimizer's tensors, as STATE/PARAMETER
        shards/                 in place of these two, of a sharded model (distributed/checkpoint.py)
        state.json              everything else: counters, cursor, random numbers, identity, lengths of the logs
        manifest.json           length and hash of each file; written last

The tensors are written from where they are, by a thread, while the next step computes its gradients. They change only
in the optimizer's update, which waits until they have been read. So saving takes no memory but one piece of a tensor,
and time only where the disk is slower than a forward and backward.

The directory is written under another name, flushed, and renamed: it is there whole or not at all. A file that is torn
or rotten all the same is found by its length and hash, and the commit before it is used.
"""

import math
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from fitune.batch_size.growth import batch_state
from fitune.batch_size.noise import NoiseAverages
from fitune.boundary import parse_json
from fitune.distributed.checkpoint import SHARDS, ShardedTensors, read_shards
from fitune.distributed.sharding import Shards
from fitune.errors import RunDirectoryError
from fitune.machine.out_of_memory import said_of, try_twice
from fitune.machine.process_memory import MemoryPeak
from fitune.machine.threads import start_thread
from fitune.model.peft_parts import PeftModel
from fitune.model.save import link_model, saved_tensors, write_files
from fitune.model.tensor_file import file_hash, write_tensors
from fitune.optimizers.table import OPTIMIZERS
from fitune.plain_files import open_plain, read_plain
from fitune.run.directory import RunDirectory, sync_directory, write_json
from fitune.run.journal import read_journal
from fitune.run.patient_files import PatientFiles
from fitune.step.assemble import Setup
from fitune.step.optimizer_state import create_state
from fitune.training.state import RunState
from fitune.units import MIB, format_bytes

SCHEMA = 1
NUM_KEPT = 2
"""The last ones; the best one is kept beside them."""
SPARE_BYTES = 4 * MIB
"""What a save leaves free for the logs, so that it does not end the run that it is to protect."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on the disk. identity, conditions: as `training/identity.py` makes them. log_bytes: how much
    of each log belongs to it, by file name. memory_model: opaque."""

    path: Path
    state: RunState
    identity: Json
    conditions: Json
    log_bytes: Mapping[str, int]
    memory_model: Json | None
    rest: Json


class CheckpointWriter:
    """Saves commits beside the training steps, one at a time.

    files: what `model_files` gives. facts: identity and conditions, for the checkpoint. logs: what writes the run's
    logs, which are written before a checkpoint counts. A save that fails leaves the
    earlier ones and is told by `failure`; failed_step: of the last one, None where that went well. writes: not in a
    process beside the one that saves.
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
        self.failed_step: int | None = None
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._is_read = threading.Event()
        self._is_read.set()
        self._hook = setup.optimizer.register_step_pre_hook(lambda *_: self._wait_until_read())

    def save(self, state: RunState, *, memory_model: Json | None = None) -> None:
        """Begin to save the commit that the model, the optimizer and `state` are at now; waits for an earlier save.

        Where `state.best_step` is this step, its model becomes best/ too.
        """
        shards = self._setup.settings.shards
        if not self._writes and shards is None:
            return
        self.wait()
        self.failed_step = None
        device = _device(self._setup.model)
        if shards is not None:
            sharded = _sharded_tensors(self._setup, shards)
            self._write(state, sharded, self._content(state, sharded, memory_model))
            return
        try:
            tensors = try_twice(lambda: _Tensors.of(self._setup), device=device, what="the copy of the model's buffers")
            content = self._content(state, tensors, memory_model)
        except Exception as error:
            self._fail(state, error)
            return
        self._is_read.clear()
        thread = threading.Thread(
            target=self._write, args=(state, tensors, content), name="fitune-checkpoint", daemon=True
        )
        if start_thread(thread):
            self._thread = thread
        else:  # the training waits for this save
            self._write(state, tensors, content)

    def _content(self, state: RunState, tensors: "_Tensors | ShardedTensors", memory_model: Json | None) -> Json:
        return {
            "schema": SCHEMA,
            "state": state_json(state),
            "random": random_state(_device(self._setup.model)),
            "scaler": None if self._setup.scaler is None else self._setup.scaler.state_dict(),
            "optimizer": tensors.optimizer_scalars,
            "memory_model": memory_model,
            "log_bytes": {log.name: self._logs.size(log) for log in _logs(self._run)},
            **self._facts,
        }

    def failure(self) -> str | None:
        """Why the last save that ended was none, told once."""
        sentence, self._failure = self._failure, None
        return sentence

    def wait(self) -> None:
        """Until nothing is being saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        self.wait()
        self._hook.remove()

    def _wait_until_read(self) -> None:
        self._is_read.wait()

    def _write(self, state: RunState, tensors: "_Tensors | ShardedTensors", content: Json) -> None:
        final = checkpoint_path(self._run, state.step)
        new = final.with_name(f".{final.name}")

        def begin() -> None:
            copied = sum(map(len, self._files.values()))
            _check_room(self._run.checkpoints, tensors.num_bytes + 3 * copied)  # last/ and best/ have copies
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
            for log in _logs(self._run):
                _flush(log)
            _write_manifest(new, hashes)
            _put_in_place(new, final)
            sync_directory(final.parent)
            link_model(final / "model", self._run.last)
            if state.best_step == state.step:
                link_model(final / "model", self._run.best)
            _remove_old(self._run, state)
        except Exception as error:  # of whatever kind: in a thread nobody else would hear of it
            self._fail(state, error)
            if self._writes:
                shutil.rmtree(new, ignore_errors=True)
        finally:
            self._is_read.set()

    def _fail(self, state: RunState, error: Exception) -> None:
        self.failed_step = state.step
        self._failure = f"step {state.step} could not be saved: {said_of(error)}"


@dataclass(frozen=True)
class _Tensors:
    """What is saved of a commit, as live tensors. weights: None where the model's file holds the same."""

    model_file: str
    model: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor] | None
    optimizer: Mapping[str, torch.Tensor]
    optimizer_scalars: Json

    @classmethod
    def of(cls, setup: Setup) -> "_Tensors":
        """Buffers are copied: a forward may change them."""
        buffers = {tensor.data_ptr() for tensor in setup.model.buffers()}

        def kept(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: t.clone() if t.data_ptr() in buffers else t for name, t in tensors.items()}

        live = live_tensors(setup.model)
        model_file, model = saved_tensors(setup.model)
        is_same = live.keys() == model.keys() and all(live[name].data_ptr() == model[name].data_ptr() for name in live)
        optimizer, scalars = optimizer_state(setup)
        return cls(model_file, kept(model), None if is_same else kept(live), optimizer, scalars)

    @property
    def num_bytes(self) -> int:
        parts = (self.model, self.weights or {}, self.optimizer)
        return sum(tensor.nbytes for tensors in parts for tensor in tensors.values())

    def write(self, directory: Path, *, begin: Callable[[], None]) -> dict[str, str]:
        """Path in the directory -> hash. begin: makes it."""
        begin()
        parts = {f"model/{self.model_file}": self.model, "optimizer.safetensors": self.optimizer}
        if self.weights is not None:
            parts["weights.safetensors"] = self.weights
        (directory / "model").mkdir()
        return {name: write_tensors(directory / name, tensors) for name, tensors in parts.items()}


def _sharded_tensors(setup: Setup, shards: Shards) -> ShardedTensors:
    weights = {f"weights/{name}": tensor for name, tensor in live_tensors(setup.model).items()}
    optimizer, scalars = optimizer_state(setup)
    optimizer = {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    return ShardedTensors(setup.model, shards, weights | optimizer, scalars)


def checkpoint_path(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, each once, and the buffers that a saved model holds; by the model's own names."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = model.state_dict().keys()
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def optimizer_state(setup: Setup) -> tuple[dict[str, torch.Tensor], Json]:
    """(tensors as STATE/PARAMETER, other values as parameter -> state -> value)."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Json] = {}
    for name, parameter in setup.model.named_parameters():
        for key, value in setup.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def newest_checkpoint(run: RunDirectory) -> tuple[Checkpoint | None, list[str]]:
    """(the last whole commit, why each later one is passed over). None where nothing was ever saved.

    Raises RunDirectoryError where there are some and none is whole.
    """
    paths = sorted(_checkpoints(run).values(), reverse=True)
    faults: list[str] = []
    for path in paths:
        try:
            _verify(path)
            return _read(path), faults
        except Exception as error:  # a file may hold anything
            faults.append(f"{path} is damaged: {error}")
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise RunDirectoryError(
            f"no checkpoint of {run.path} is whole: start again from its weights with model.source={run.last}, or "
            f"from the beginning with --overwrite\n{listed}"
        )
    return None, faults


def restore(checkpoint: Checkpoint, setup: Setup) -> None:
    """Put weights, optimizer and random numbers where they were. May be done again where it failed. Raises
    RunDirectoryError where the tensors cannot be read or are not those of this model and optimizer, and
    OutOfMemoryError."""
    try:
        if setup.settings.shards is None:
            try_twice(
                lambda: _restore_tensors(checkpoint, setup),
                device=_device(setup.model),
                what=f"what {checkpoint.path} holds",
            )
        else:
            _restore_shards(checkpoint, setup, setup.settings.shards)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{checkpoint.path} cannot be read: {said_of(error)}; the checkpoint itself is as it was"
        ) from error
    if setup.scaler is not None and checkpoint.rest["scaler"] is not None:
        setup.scaler.load_state_dict(checkpoint.rest["scaler"])
    set_random_state(checkpoint.rest["random"], _device(setup.model))


def _restore_shards(checkpoint: Checkpoint, setup: Setup, shards: Shards) -> None:
    if not (checkpoint.path / SHARDS).is_dir():
        raise RunDirectoryError(
            f"{checkpoint.path} was saved by model.shard=none: go on with it, or start a new run with "
            "model.source=RUN/last"
        )
    create_state(setup.optimizer)
    shards.peers.exchange(None)  # the first process may have stopped in what it does alone
    read_shards(checkpoint.path / SHARDS, _sharded_tensors(setup, shards).tensors)
    _restore_scalars(checkpoint, setup)


def _restore_tensors(checkpoint: Checkpoint, setup: Setup) -> None:
    if (checkpoint.path / SHARDS).is_dir():
        raise RunDirectoryError(
            f"{checkpoint.path} was saved by model.shard=full: go on with it under torchrun, or start a new run with "
            "model.source=RUN/last"
        )
    weights = checkpoint.path / "weights.safetensors"
    if not weights.exists():
        weights = checkpoint.path / "model" / "model.safetensors"
    live = live_tensors(setup.model)
    with safe_open(weights, framework="pt") as file:
        if set(file.keys()) != set(live):
            raise RunDirectoryError(f"{weights} holds other parameters than this model: start a new run from it")
        for name, tensor in live.items():
            tensor.copy_(file.get_tensor(name))
    _restore_optimizer(checkpoint, setup)


def _restore_optimizer(checkpoint: Checkpoint, setup: Setup) -> None:
    """Not by `load_state_dict`, which would cast the tensors to the parameters' type."""
    parameters = dict(setup.model.named_parameters())
    groups = {parameter: group for group in setup.optimizer.param_groups for parameter in group["params"]}
    setup.optimizer.state.clear()
    with safe_open(checkpoint.path / "optimizer.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            key, _, parameter_name = name.partition("/")
            parameter = parameters[parameter_name]
            group = groups[parameter]
            on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
            device = torch.device("cpu") if on_host else parameter.device
            setup.optimizer.state[parameter][key] = file.get_tensor(name).to(device, copy=True)  # not the file mapped
    _restore_scalars(checkpoint, setup)


def _restore_scalars(checkpoint: Checkpoint, setup: Setup) -> None:
    parameters = dict(setup.model.named_parameters())
    for parameter_name, scalars in checkpoint.rest["optimizer"].items():
        setup.optimizer.state[parameters[parameter_name]].update(scalars)


def roll_back(run: RunDirectory, checkpoint: Checkpoint | None) -> list[str]:
    """Make the directory that of the commit (None: of a run that has not begun): the logs end there, later checkpoints
    are gone, last/ and best/ are its own. What the logs have lost is told, one sentence each."""
    lost = []
    for log in _logs(run):
        size = 0 if checkpoint is None else checkpoint.log_bytes.get(log.name, 0)
        if _size(log) < size:
            lost.append(f"{log} has lost {size - _size(log):,} of the {size:,} bytes that were written")
        elif log.exists():
            with open(log, "rb+", opener=open_plain) as file:
                file.truncate(size)
    step = 0 if checkpoint is None else checkpoint.state.step
    if checkpoint is not None and not lost:
        try:
            links = [line.hash for line in read_journal(run.journal)]
            if links[-1:] != [checkpoint.state.journal_hash]:
                lost.append(f"{run.journal} does not end with step {step}")
        except RunDirectoryError as error:
            lost.append(str(error))
    for path in (*run.checkpoints.glob(".step-*"), *(p for n, p in _checkpoints(run).items() if n > step)):
        shutil.rmtree(path)
    for path in run.path.glob(".*.*"):  # of a process that was killed while it wrote
        if path.suffix[1:].isdigit():
            path.unlink()
    if checkpoint is None:
        return lost
    link_model(checkpoint.path / "model", run.last)
    best_step = checkpoint.state.best_step
    if best_step is None:
        shutil.rmtree(run.best, ignore_errors=True)
    elif (best := checkpoint_path(run, best_step)).is_dir():
        link_model(best / "model", run.best)
    return lost


def check_disk(output: Path, setup: Setup, optimizer_name: str) -> str | None:
    """A sentence where not all checkpoints of a run find room in `output`, which need not exist yet.

    Raises RunDirectoryError where not even one does.
    """
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    one_bytes = _planned_bytes(setup, optimizer_name)
    if not shutil.disk_usage(place).total:  # /proc and its like
        raise RunDirectoryError(f"{place} is no place for files: its file system has 0 bytes; change run.output")
    _check_room(place, one_bytes)
    free_bytes, most_bytes = shutil.disk_usage(place).free, one_bytes * (NUM_KEPT + 2)
    if most_bytes + SPARE_BYTES <= free_bytes:
        return None
    return (
        f"checkpoints will need {format_bytes(most_bytes)} ({NUM_KEPT} last ones, the best one, one being written) and "
        f"{output} has {format_bytes(free_bytes)} free: what does not fit is not saved, and said"
    )


def _planned_bytes(setup: Setup, optimizer_name: str) -> int:
    """Of one checkpoint, the optimizer's state included where it does not exist yet."""
    shards = setup.settings.shards
    tensors = _Tensors.of(setup) if shards is None else _sharded_tensors(setup, shards)
    if isinstance(tensors, _Tensors) and tensors.optimizer:
        return tensors.num_bytes
    trained = sum(parameter.nbytes for parameter in setup.model.parameters() if parameter.requires_grad)
    return tensors.num_bytes + int(trained * OPTIMIZERS[optimizer_name].state_share)


def state_json(state: RunState) -> Json:
    """A number that is not finite is written as text, as in the logs."""
    content: Json = _as_text(asdict(state))
    return content


def read_state(saved: Mapping[str, Any]) -> RunState:
    """What `state_json` gave."""
    content: Json = _as_numbers(saved)
    nouns: Json = {
        "peak": MemoryPeak(**content["peak"]),
        "noise": NoiseAverages(**content["noise"]),
        "preconditioned_noise": NoiseAverages(**content["preconditioned_noise"]),
        "batch": batch_state(content["batch"]),
        "eval_losses": tuple(content["eval_losses"]),
    }
    return RunState(**(content | nouns))


def _as_text(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _as_text(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_numbers(value: Any) -> Any:
    """What `_as_text` took."""
    if isinstance(value, Mapping):
        return {name: _as_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_as_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def random_state(device: torch.device) -> Json:
    """Of all generators that a model may draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def set_random_state(content: Json, device: torch.device) -> None:
    torch.set_rng_state(_byte_tensor(content["torch"]))
    if device.type == "cuda" and content["cuda"] is not None:
        torch.cuda.set_rng_state(_byte_tensor(content["cuda"]), device)
    version, words, gauss = content["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(content["numpy"]))


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _device(model: PreTrainedModel | PeftModel) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _checkpoints(run: RunDirectory) -> dict[int, Path]:
    """By step."""
    paths = (path for path in run.checkpoints.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))
    return {int(path.name.removeprefix("step-")): path for path in paths}


def _write_manifest(directory: Path, hashes: Mapping[str, str]) -> None:
    """hashes: of the files that were hashed while they were written. All files are on the disk before the manifest."""
    files: Json = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in hashes:
            _flush(path)
        files[name] = {"bytes": path.stat().st_size, "xxh3_128": hashes.get(name) or file_hash(path)}
    for path in (directory / "model", *(directory / "model").rglob("*")):
        if path.is_dir():
            sync_directory(path)
    write_json(directory / "manifest.json", {"schema": SCHEMA, "files": files})


def _verify(path: Path) -> None:
    """Raises ValueError, OSError, KeyError or TypeError where it is not whole."""
    manifest = parse_json(read_plain(path / "manifest.json"))
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"it has schema {manifest['schema']}, and this fitune reads schema {SCHEMA}")
    for name, expected in manifest["files"].items():
        if (size := (path / name).stat().st_size) != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} of {expected['bytes']:,} bytes")
        if file_hash(path / name) != expected["xxh3_128"]:
            raise ValueError(f"{name} holds other bytes than were written")


def _read(path: Path) -> Checkpoint:
    content = parse_json(read_plain(path / "state.json"))
    return Checkpoint(
        path=path,
        state=read_state(content["state"]),
        identity=content["identity"],
        conditions=content["conditions"],
        log_bytes=content["log_bytes"],
        memory_model=content["memory_model"],
        rest=content,
    )


def _remove_old(run: RunDirectory, state: RunState) -> None:
    steps = sorted(_checkpoints(run))
    for step in set(steps[:-NUM_KEPT]) - {state.best_step}:
        _remove(checkpoint_path(run, step))


def _put_in_place(new: Path, final: Path) -> None:
    """Rename a whole checkpoint. An earlier one of that step, saved before its evaluation, is removed afterwards."""
    if not final.exists():
        new.rename(final)
        return
    hidden = _hidden(final)
    final.rename(hidden)
    try:
        new.rename(final)
    except OSError:
        hidden.rename(final)
        raise
    shutil.rmtree(hidden)


def _remove(path: Path) -> None:
    """A directory is renamed first: half of one must never look like a whole one."""
    hidden = _hidden(path)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _check_room(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes + SPARE_BYTES > free_bytes:
        raise RunDirectoryError(
            f"{directory} has no space for {format_bytes(needed_bytes)}: {format_bytes(free_bytes)} are free"
        )


def _logs(run: RunDirectory) -> tuple[Path, ...]:
    """Which have a line for each step or evaluation, so that they end with the commit. What happened, and how memory
    was, stays true when steps are done again."""
    return run.metrics, run.journal, run.eval_rows


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _flush(path: Path) -> None:
    if path.exists():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
