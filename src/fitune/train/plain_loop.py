"""The safe step for a training loop that is not fitune's: in the place of forward, backward, clipping and update."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fitune.step.model_check import Probe, Verdict, check_model
from fitune.step.optimizer_state import create_state
from fitune.step.out_of_memory import try_twice
from fitune.step.safe_step import Protection, SafeResult, Work
from fitune.train.adapt import MemoryModel
from fitune.train.observed import fitted_step, room_bytes

Tensors = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Tensors, float], Tensor]
"""loss(model, rows, num_targets): the sum of these rows' target losses, divided by num_targets."""


@dataclass(frozen=True)
class _Part:
    """Some rows of a batch. num_positions: elements of its first tensor."""

    rows: tuple[int, ...]
    tensors: Tensors
    loss_weight: float

    @property
    def row_ids(self) -> tuple[int, ...]:
        return self.rows

    @property
    def num_positions(self) -> int:
        return next(iter(self.tensors.values())).numel()


@dataclass
class SafeStep:
    """One optimizer step on one batch that running out of memory neither changes nor ends.

        safe_step = fitune.SafeStep(model, optimizer)
        for batch in loader:
            safe_step(batch)

    A batch is a mapping of tensors whose first dimension is its rows. It is computed whole if it fits, else in as many
    parts as needed, with the gradient of the whole. loss: as `Loss`; the model's own, as transformers computes it with
    num_items_in_batch, where left out. num_targets: of rows; the labels[:, 1:] that are not -100 where left out. clip:
    the largest gradient norm, 0 for none. commit: see `StepSettings`. most_rows: of a part, where the whole batch shall
    not be tried.

    The first call looks at two of its rows whether the loss may be computed in parts, and warns where it may not
    (`verdict`). Raises OutOfMemoryError where one row alone does not fit; nothing is changed then.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss | None = None
    num_targets: Callable[[Tensors], float] | None = None
    clip: float = 1.0
    commit: bool = False
    most_rows: int | None = None
    scaler: torch.amp.GradScaler | None = None
    seed: int = 0
    verdict: Verdict | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        work = Work(
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            loss_share=lambda part, weight: (self.loss or _own_loss)(self.model, part.tensors, weight),
            split=self._split,
            without=self._without,
            clip=self.clip,
            commit=self.commit,
        )
        self._protection: Protection[_Part] = Protection(
            work=work, seed=self.seed, room=lambda: room_bytes(self._protection.device)
        )
        self._memory: MemoryModel | None = None

    def __call__(self, batch: Mapping[str, Any]) -> SafeResult:
        """`.grad` is None before and after. A learning rate schedule is the caller's, after each call."""
        device = self._protection.device
        whole = self._part(
            tuple(range(len(next(iter(batch.values()))))), {name: value.to(device) for name, value in batch.items()}
        )
        if self._memory is None:
            try_twice(lambda: create_state(self.optimizer), device=device, what="the optimizer's state")
            self.verdict = self._check(whole)
            self._memory = MemoryModel(planned=1)
        self.steps += 1
        num_rows, row_positions = len(whole.rows), whole.num_positions // len(whole.rows)
        return fitted_step(
            self._memory,
            self._protection,
            lambda most_positions: self._split(whole, most_positions),
            step=self.steps,
            most_positions=row_positions * min(self.most_rows or num_rows, num_rows),
            row_positions=row_positions,
        )

    def _part(self, rows: tuple[int, ...], tensors: Tensors) -> _Part:
        return _Part(rows, tensors, float((self.num_targets or _num_labels)(tensors)))

    def _take(self, part: _Part, places: Sequence[int]) -> _Part:
        return self._part(
            tuple(part.rows[place] for place in places),
            {name: value[list(places)] for name, value in part.tensors.items()},
        )

    def _split(self, part: _Part, most_positions: int) -> list[_Part]:
        at_once = max(most_positions * len(part.rows) // part.num_positions, 1)
        places = range(len(part.rows))
        if at_once >= len(places):
            return [part]
        return [self._take(part, places[first : first + at_once]) for first in range(0, len(places), at_once)]

    def _without(self, part: _Part, row_ids: Collection[int]) -> _Part | None:
        kept = [place for place, row in enumerate(part.rows) if row not in row_ids]
        return self._take(part, kept) if kept else None

    def _check(self, whole: _Part) -> Verdict | None:
        """Of the two rows that differ most in their number of targets; None where there are no two with targets."""
        rows = sorted((self._take(whole, [place]) for place in range(len(whole.rows))), key=lambda row: row.loss_weight)
        rows = [row for row in rows if row.loss_weight]
        if len(rows) < 2:
            return None
        first, second = rows[0], rows[-1]
        both = self._take(whole, [whole.rows.index(part.rows[0]) for part in (first, second)])
        masked = None
        if self.loss is None:
            empty = {**first.tensors, "labels": torch.full_like(first.tensors["labels"], -100)}
            masked = _Part(first.rows, empty, 0.0)
        verdict = check_model(
            self.model,
            self._protection.work.loss_share,
            Probe(both, first, second, masked, both.loss_weight),
            mean_by="forward" if self.loss is None else "loss function",
        )
        if not verdict.exact:
            warnings.warn(f"fitune: not exact in parts: {verdict.reason}", stacklevel=3)
        return verdict


def _own_loss(model: nn.Module, rows: Tensors, num_targets: float) -> Tensor:
    loss: Tensor = model(**rows, num_items_in_batch=num_targets).loss
    return loss


def _num_labels(rows: Tensors) -> float:
    return float((rows["labels"][:, 1:] != -100).sum())
