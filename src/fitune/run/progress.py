"""Tells how far a run is, and when it will end, from what it has written."""

from collections.abc import Sequence

from fitune.run.directory import RunRecord
from fitune.run.memory import MemorySample

#: The remaining time is that at the speed of these last seconds.
ETA_WINDOW_SECONDS = 600.0


def progress_fraction(
    record: RunRecord, last_step: int | None, samples: Sequence[MemorySample]
) -> float | None:
    """Return the share of the run (0 to 1) that is done, or None if unknown."""
    if record.state == "finished":
        return 1.0
    if (known := known_total_steps(record)) is not None:
        return 0.0 if last_step is None else min(last_step / known, 1.0)
    return samples[-1].progress_fraction if samples else None


def known_total_steps(record: RunRecord) -> int | None:
    """Return how many steps the run will have, or None if it did not record that."""
    return None if record.summary is None else record.summary.total_steps


def seconds_left(record: RunRecord, samples: Sequence[MemorySample]) -> float | None:
    """Return the remaining time at the speed of the last minutes, with evaluations and saves."""
    if record.state != "running" or not samples:
        return None
    newest = samples[-1]
    changes: list[MemorySample] = []
    for sample in samples:
        if sample.progress_fraction is None or newest.time - sample.time > ETA_WINDOW_SECONDS:
            continue
        if changes and sample.progress_fraction < (changes[-1].progress_fraction or 0):
            changes.clear()  # the run was resumed from an earlier step
        if not changes or sample.step != changes[-1].step:
            changes.append(sample)
    if len(changes) < 2:
        return None
    first, last = changes[0], changes[-1]
    assert first.progress_fraction is not None
    assert last.progress_fraction is not None
    speed = (last.progress_fraction - first.progress_fraction) / (last.time - first.time)
    return (1 - last.progress_fraction) / speed - (newest.time - last.time) if speed > 0 else None
