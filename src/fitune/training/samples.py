"""The samples of a run, and micro-batches of some of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fitune.data.examples import Examples
from fitune.data.rows import Batch, MicroBatch
from fitune.step.assemble import Layout


@dataclass(frozen=True)
class Prompt:
    """A prompt of eval.prompts as the model gets it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Data:
    """The samples that a run trains on, and those that it evaluates."""

    train: Examples
    eval: Examples
    #: what is asked at each evaluation
    prompts: tuple[Prompt, ...] = ()


def micro_batches_of(
    examples: Examples, numbers: Sequence[int], layout: Layout, *, rows_at_once: int
) -> Iterator[MicroBatch]:
    """Yield micro-batches of the samples with these numbers, reading them as they are needed."""
    for start in range(0, len(numbers), rows_at_once):
        rows = tuple(examples[number] for number in numbers[start : start + rows_at_once])
        yield from layout.split(Batch(rows))
