"""Finds a run's newest intact checkpoint, restores it, and rolls the run's directory back to it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fitune.boundary import parse_json
from fitune.distributed.checkpoint import SHARDS, read_shards
from fitune.distributed.sharding import Shards
from fitune.errors import RunDirectoryError
from fitune.machine.out_of_memory import said_of, try_twice
from fitune.model.save import link_model
from fitune.plain_files import open_plain, read_plain
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.step.assemble import Setup
from fitune.step.optimizer_state import create_state
from fitune.training.checkpoint.content import (
    device_of,
    live_tensors,
    read_state,
    set_random_state,
    sharded_tensors,
)
from fitune.training.checkpoint.files import (
    Json,
    checkpoint_path,
    checkpoints_by_step,
    truncated_logs,
    verify,
)
from fitune.training.state import RunState


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint on the disk."""

    path: Path
    state: RunState
    #: as `training/identity.py` makes them
    identity: Json
    conditions: Json
    #: how many bytes of each log belong to the checkpoint, by file name
    log_bytes: Mapping[str, int]
    #: what `Guard.to_json` returned
    memory_model: Json | None
    #: the whole content of state.json
    content: Json


def newest_checkpoint(run: RunDirectory) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint, and why each later one is skipped.

    The checkpoint is None if nothing was ever saved. Raises RunDirectoryError if there are
    checkpoints and none is intact.
    """
    faults: list[str] = []
    for path in sorted(checkpoints_by_step(run).values(), reverse=True):
        try:
            verify(path)
            return _read(path), faults
        except Exception as error:  # a damaged file may hold anything
            faults.append(f"{path} is damaged: {error}")
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise RunDirectoryError(
            f"no checkpoint of {run.path} is whole: start again from its weights with model.source={run.last}, or "
            f"from the beginning with --overwrite\n{listed}"
        )
    return None, faults


def restore(checkpoint: Checkpoint, setup: Setup) -> None:
    """Set weights, optimizer, gradient scaler and random numbers to those of the checkpoint.

    A call that failed may be repeated. Raises RunDirectoryError if the tensors cannot be read or
    belong to another model or optimizer, and OutOfMemoryError.
    """
    try:
        if setup.settings.shards is None:
            try_twice(
                lambda: _restore_tensors(checkpoint, setup),
                device=device_of(setup.model),
                what=f"what {checkpoint.path} holds",
            )
        else:
            _restore_shards(checkpoint, setup, setup.settings.shards)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{checkpoint.path} cannot be read: {said_of(error)}; the checkpoint itself is as it was"
        ) from error
    if setup.scaler is not None and checkpoint.content["scaler"] is not None:
        setup.scaler.load_state_dict(checkpoint.content["scaler"])
    set_random_state(checkpoint.content["random"], device_of(setup.model))


def roll_back(run: RunDirectory, checkpoint: Checkpoint | None) -> list[str]:
    """Bring a run's directory to where it was at the checkpoint, or None, at the beginning.

    The logs are truncated, later checkpoints are removed, and last/ and best/ link to the
    checkpoint's models again. Returns a message for each log that is shorter than it was.
    """
    lost = _truncate_logs(run, checkpoint)
    step = 0 if checkpoint is None else checkpoint.state.step
    if checkpoint is not None and not lost:
        try:
            hashes = [line.hash for line in read_journal(run.journal)]
            if hashes[-1:] != [checkpoint.state.journal_hash]:
                lost.append(f"{run.journal} does not end with step {step}")
        except RunDirectoryError as error:
            lost.append(str(error))
    later = (path for number, path in checkpoints_by_step(run).items() if number > step)
    for path in (*run.checkpoints.glob(".step-*"), *later):
        shutil.rmtree(path)
    for path in run.path.glob(".*.*"):  # left by a process that was killed while it wrote
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


def _read(path: Path) -> Checkpoint:
    content = parse_json(read_plain(path / "state.json"))
    return Checkpoint(
        path=path,
        state=read_state(content["state"]),
        identity=content["identity"],
        conditions=content["conditions"],
        log_bytes=content["log_bytes"],
        memory_model=content["memory_model"],
        content=content,
    )


def _truncate_logs(run: RunDirectory, checkpoint: Checkpoint | None) -> list[str]:
    """Cut the logs off where the checkpoint ends; return a message for each that is too short."""
    lost = []
    for log in truncated_logs(run):
        size = 0 if checkpoint is None else checkpoint.log_bytes.get(log.name, 0)
        present = log.stat().st_size if log.exists() else 0
        if present < size:
            lost.append(
                f"{log} has lost {size - present:,} of the {size:,} bytes that were written"
            )
        elif log.exists():
            with open(log, "rb+", opener=open_plain) as file:
                file.truncate(size)
    return lost


def _restore_shards(checkpoint: Checkpoint, setup: Setup, shards: Shards) -> None:
    if not (checkpoint.path / SHARDS).is_dir():
        raise RunDirectoryError(
            f"{checkpoint.path} was saved by model.shard=none: go on with it, or start a new run with "
            "model.source=RUN/last"
        )
    create_state(setup.optimizer)
    # if the first process stopped while it rolled the directory back, the others stop here
    shards.peers.exchange(None)
    read_shards(checkpoint.path / SHARDS, sharded_tensors(setup, shards).tensors)
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
            raise RunDirectoryError(
                f"{weights} holds other parameters than this model: start a new run from it"
            )
        for name, tensor in live.items():
            tensor.copy_(file.get_tensor(name))
    _restore_optimizer(checkpoint, setup)


def _restore_optimizer(checkpoint: Checkpoint, setup: Setup) -> None:
    # `load_state_dict` would cast the tensors to the parameters' dtype
    parameters = dict(setup.model.named_parameters())
    groups = {
        parameter: group for group in setup.optimizer.param_groups for parameter in group["params"]
    }
    setup.optimizer.state.clear()
    with safe_open(checkpoint.path / "optimizer.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            key, _, parameter_name = name.partition("/")
            parameter = parameters[parameter_name]
            group = groups[parameter]
            on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
            device = torch.device("cpu") if on_host else parameter.device
            # without the copy the tensor could stay a view of the mapped file
            tensor = file.get_tensor(name).to(device, copy=True)
            setup.optimizer.state[parameter][key] = tensor
    _restore_scalars(checkpoint, setup)


def _restore_scalars(checkpoint: Checkpoint, setup: Setup) -> None:
    parameters = dict(setup.model.named_parameters())
    for parameter_name, scalars in checkpoint.content["optimizer"].items():
        setup.optimizer.state[parameters[parameter_name]].update(scalars)
