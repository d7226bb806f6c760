"""Brings a run from its directory to where it continues: its newest checkpoint, if that matches."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from fitune.config import RunConfig
from fitune.data.packing import lay_out
from fitune.data.rows import Batch, MicroBatch
from fitune.data.unpacking import lay_out_as
from fitune.distributed.processes import Ranks
from fitune.errors import FituneError, UsageError
from fitune.run.directory import RunDirectory
from fitune.run.journal import JournalLine, StepRecord, plan_parts, read_journal
from fitune.step.assemble import Setup, choose_precision
from fitune.training.checkpoint.read import Checkpoint, restore, roll_back
from fitune.training.identity import Json, check_identity, condition_note
from fitune.training.state import RunState


@dataclass(frozen=True)
class Start:
    """Where a run continues."""

    state: RunState
    #: what the user must know about it, one message each
    notes: tuple[str, ...]
    #: what `Guard.to_json` returned
    memory_model: Json | None = None


@dataclass(frozen=True)
class Replay:
    """The journal of a run whose steps are repeated."""

    path: Path
    lines: tuple[JournalLine, ...]


def go_on(
    run: RunDirectory,
    checkpoint: Checkpoint | None,
    setup: Setup,
    *,
    dropout: bool,
    facts: tuple[Json, Json],
    allowed: Collection[str] = (),
    ranks: Ranks | None = None,
) -> Start:
    """Roll the directory back to `checkpoint`, and restore weights, optimizer and random numbers.

    checkpoint: None for a run of which nothing was saved; it starts from the beginning.
    dropout: whether the training draws random masks.
    facts: identity and conditions of the present configuration.
    allowed: keys of the identity that may have changed.
    ranks: the processes that do this together, of which only the first changes the directory.

    Raises RunDirectoryError, before anything is changed, if anything else in the identity differs.
    """
    identity, conditions = facts
    leads = ranks is None or ranks.leads
    if checkpoint is None:
        lost = roll_back(run, None) if leads else []
        return Start(RunState(), ("nothing was saved yet: starts from the beginning", *lost))
    notes = check_identity(checkpoint.identity, identity, allowed=allowed)
    note = condition_note(checkpoint.conditions, conditions, dropout=dropout)
    lost = roll_back(run, checkpoint) if leads else []
    restore(checkpoint, setup)
    where = f"goes on after step {checkpoint.state.step}"
    return Start(
        checkpoint.state, (where, *notes, *([note] if note else []), *lost), checkpoint.memory_model
    )


def pin_precision(config: RunConfig, checkpoint: Checkpoint, device: torch.device) -> RunConfig:
    """Replace model.precision=auto by what it chose when the run began.

    Another device could choose differently.
    """
    saved = checkpoint.identity["model.precision"]
    if config.model.precision != "auto" or choose_precision(config.model, device).name == saved:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": saved})})


def read_replay(run: RunDirectory) -> Replay:
    """Read the journal of a run. Raises RunDirectoryError if it is missing, damaged or changed."""
    return Replay(run.path, read_journal(run.journal))


def replayed_split(
    batch: Batch, line: JournalLine, *, packed: bool, ranks: Ranks
) -> list[MicroBatch]:
    """Split a batch into this process's micro-batches as that line of the journal lists them.

    A sample that is in the batch twice has one id. Raises UsageError if the step was done by
    another number of processes.
    """
    parts = plan_parts(line.plan)
    if len(parts) != ranks.size:
        raise UsageError(
            f"step {line.step} was done by {len(parts)} processes and cannot be replayed by {ranks.size}: start "
            f"{len(parts)}, with torchrun --nproc_per_node {len(parts)}"
        )
    try:
        return lay_out_as(batch, parts[ranks.rank], packed=packed)
    except KeyError:
        # The batch differs from the line's, and the comparison after the step will report it.
        return [lay_out(batch.rows, packed=packed)]


def replayed_fallbacks(replay: Replay, number: int, *, rank: int) -> tuple[str, ...]:
    """Return the fallbacks that this process used in line `number` (from 0) of the journal."""
    fallbacks = replay.lines[number].reliefs if number < len(replay.lines) else ()
    return fallbacks[rank] if fallbacks else ()


def check_replayed(replay: Replay, number: int, record: StepRecord) -> None:
    """Compare a repeated step with line `number` (from 0) of the journal.

    Raises FituneError if they differ.
    """
    line = replay.lines[number]
    names = [
        name
        for name in StepRecord.__dataclass_fields__
        if getattr(record, name) != getattr(line, name)
    ]
    if names:
        listed = "\n".join(
            f"  {name} {getattr(line, name)} -> {getattr(record, name)}" for name in names
        )
        raise FituneError(f"the replay differs from {replay.path} at step {line.step}:\n{listed}")
