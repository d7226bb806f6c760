"""Computes the log-probabilities of a run's pairs under the reference once, and keeps them.

The reference is the model as the run begins: with adapters, the model under them. So nothing but
these numbers is needed of it, two for each pair, and a second model is never in memory. They are
kept in the run's directory, since a resumed or repeated run must not compute them with weights that
were trained.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from fitune.boundary import parse_json
from fitune.data.examples import Examples
from fitune.data.rows import MicroBatch, sequences_of
from fitune.distributed.processes import Ranks
from fitune.errors import RunDirectoryError
from fitune.machine.out_of_memory import release_memory
from fitune.plain_files import MAX_LOG_BYTES, read_plain
from fitune.recovery.evaluate import safe_evaluate
from fitune.recovery.failure import Failure
from fitune.recovery.observed import allocatable_bytes, survivable
from fitune.run.directory import RunDirectory
from fitune.run.files import write_json
from fitune.step.assemble import Setup
from fitune.step.evaluate import merge_evaluations
from fitune.training.samples import Data
from fitune.units import format_seconds

#: pairs that are laid out in micro-batches together
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class WithReference:
    """The samples of a run with the reference's log-probabilities."""

    data: Data
    #: what was done for them, one message each
    notes: tuple[str, ...]


def read_reference(run: RunDirectory, data: Data) -> Data:
    """Return the samples with the log-probabilities that a run has kept.

    Raises RunDirectoryError if they are missing or damaged, or of other samples.
    """
    path = run.reference
    try:
        content = parse_json(read_plain(path, most_bytes=MAX_LOG_BYTES))
        train, held_out = (
            _read_side(content[side], len(examples))
            for side, examples in (("train", data.train), ("eval", data.eval))
        )
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path} is missing, and the weights are trained already, so it cannot be computed: "
            "begin a new run"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged, and the weights are trained already, so it cannot be computed: "
            "begin a new run"
        ) from error
    for side, examples in (("train", data.train), ("eval", data.eval)):
        if content[side]["data_hash"] != examples.data_hash:
            raise RunDirectoryError(
                f"{path} is of other samples, and the weights are trained already, so it cannot be computed: "
                "begin a new run"
            )
    return _with(data, train, held_out)


def compute_reference(setup: Setup, data: Data, *, ranks: Ranks) -> WithReference:
    """Compute the log-probabilities of both sides with the present weights.

    It is done in micro-batches of the size of an evaluation, smaller ones where memory runs out.

    Raises OutOfMemoryError if a single answer does not fit.
    """
    start = time.perf_counter()
    failures: list[Failure] = []
    train, held_out = (
        _log_probs(setup, examples, ranks=ranks, on_failures=failures.extend)
        for examples in (data.train, data.eval)
    )
    seconds = format_seconds(time.perf_counter() - start)
    num_rows = len(data.train) + len(data.eval)
    done = f"log-probabilities of {num_rows:,} samples under the reference computed in {seconds}"
    return WithReference(_with(data, train, held_out), (*map(str, failures), done))


def write_reference(run: RunDirectory, data: Data) -> None:
    """Keep the log-probabilities with the run. Raises RunDirectoryError if that fails."""
    sides = {"train": data.train, "eval": data.eval}
    write_json(run.reference, {name: _side(examples) for name, examples in sides.items()})


def _log_probs(
    setup: Setup,
    examples: Examples,
    *,
    ranks: Ranks,
    on_failures: Callable[[tuple[Failure, ...]], None],
) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of both answers of each pair, float32 [samples, 2]."""
    device = next(setup.model.parameters()).device
    with survivable(device):
        found = safe_evaluate(
            setup.model,
            _sequences(setup, examples, range(ranks.rank, len(examples), ranks.size)),
            settings=setup.settings.of_reference(),
            query_free_bytes=lambda: allocatable_bytes(device),
        )
    release_memory(device)
    on_failures(found.failures)
    losses = merge_evaluations(ranks.exchange(found.result)).row_losses
    return -np.array(losses, np.float32).reshape(-1, 2)


def _sequences(setup: Setup, examples: Examples, numbers: range) -> Iterator[MicroBatch]:
    """Yield micro-batches of the single sequences of these pairs, two numbers for each pair."""
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = (examples[number] for number in numbers[start : start + _ROWS_AT_ONCE])
        yield from setup.eval_layout.split(sequences_of(rows))


def _with(data: Data, train: npt.NDArray[np.float32], held_out: npt.NDArray[np.float32]) -> Data:
    return Data(replace(data.train, reference=train), replace(data.eval, reference=held_out))


def _side(examples: Examples) -> dict[str, object]:
    assert examples.reference is not None
    return {
        "data_hash": examples.data_hash,
        "values_hash": _hash(examples.reference),
        "values": examples.reference.tolist(),
    }


def _read_side(content: dict[str, Any], num_rows: int) -> npt.NDArray[np.float32]:
    """Return the values [samples, 2]; raises ValueError if they are not as they were written."""
    values = np.array(content["values"], np.float32).reshape(-1, 2)
    if _hash(values) != content["values_hash"]:
        raise ValueError(content["values_hash"])
    # other samples have another hash, which is reported by itself
    return values if len(values) == num_rows else np.zeros((num_rows, 2), np.float32)


def _hash(values: npt.NDArray[np.float32]) -> str:
    return blake2b(values.astype("<f4").tobytes(), digest_size=16).hexdigest()
