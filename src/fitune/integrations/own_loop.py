"""The safe step for a training loop that is not fitune's: in the place of forward, backward, clipping and update."""

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitune.boundary import bounded
from fitune.errors import UsageError
from fitune.language import translated
from fitune.machine.out_of_memory import memory_failure, release_memory, try_twice
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.recovery.observed import fitted_step, room_bytes
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import MemoryModel
from fitune.recovery.step import SafeResult
from fitune.step.optimizer_state import create_state
from fitune.step.progress import Work

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

    The first call with two rows to learn from looks at them whether the loss may be computed in parts, and warns where
    it may not (`verdict`). Raises OutOfMemoryError where one row alone does not fit; nothing is changed then. Raises
    UsageError for a model, optimizer or batch that cannot be done again in parts. What the model, the loss or
    num_targets raise comes through as it is.
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

    @bounded("fitune.SafeStep", calls_back=True)
    def __post_init__(self) -> None:
        self._refuse_what_cannot_be_done_again()
        work = Work(
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            loss_share=self._loss_share,
            split=self._split,
            without=self._without,
            clip=self.clip,
            commit=self.commit,
        )
        self._protection: Protection[_Part] = Protection(
            work=work, seed=self.seed, room=lambda: room_bytes(self._protection.device)
        )
        self._memory: MemoryModel | None = None

    @bounded("fitune.SafeStep", calls_back=True)
    def __call__(self, batch: Mapping[str, Any]) -> SafeResult:
        """`.grad` is None before and after. A learning rate schedule is the caller's, after each call."""
        self._drop_gradients()
        device, num_rows = self._protection.device, _num_rows(batch)
        whole = self._part(tuple(range(num_rows)), {name: value.to(device) for name, value in batch.items()})
        if self._memory is None:
            try_twice(lambda: create_state(self.optimizer), device=device, what="the optimizer's state")
            self._memory = MemoryModel(planned=1)
        if self.verdict is None:
            self.verdict = self._checked(whole)
        self.steps += 1
        row_positions = whole.num_positions // num_rows
        result = fitted_step(
            self._memory,
            self._protection,
            lambda most_positions: self._split(whole, most_positions),
            step=self.steps,
            most_positions=row_positions * min(self.most_rows or num_rows, num_rows),
            row_positions=row_positions,
        )
        self._drop_gradients()
        return result

    def _loss_share(self, part: _Part, weight: float) -> Tensor:
        loss = (self.loss or _own_loss)(self.model, part.tensors, weight)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(f"the loss of SafeStep is {found}: return a tensor of one element, with its graph")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise UsageError(
                "the loss of SafeStep leads to no parameter that is trained: compute it without detach(), .item() and "
                "no_grad(), from parameters with requires_grad=True"
            )
        return loss

    def _drop_gradients(self) -> None:
        """Also those that the optimizer does not know, or that another backward has left."""
        self.model.zero_grad(set_to_none=True)

    def _refuse_what_cannot_be_done_again(self) -> None:
        if isinstance(self.model, DistributedDataParallel):
            raise UsageError(
                "SafeStep got a DistributedDataParallel, whose processes wait for each other in every backward, so "
                "that none can repeat one alone: use `torchrun -m fitune train`, or its .module in one process"
            )
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise UsageError("SafeStep got LBFGS, which computes the loss several times in an update: use AdamW or SGD")
        known = {id(parameter) for parameter in self.model.parameters()}
        others = sum(id(each) not in known for group in self.optimizer.param_groups for each in group["params"])
        if others:
            raise UsageError(
                f"the optimizer trains {others} parameters that are not the model's, whose gradients SafeStep could "
                "not take back: give it one nn.Module that holds them all"
            )
        names = inspect.signature(self.model.forward).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in names.values())
        if self.loss is None and not takes_any and "num_items_in_batch" not in names:
            raise UsageError(
                "the model's forward takes no num_items_in_batch, so its loss is a mean of the samples that it is "
                "given: "
                "give SafeStep loss=f, where f(model, samples, num_targets) is the sum of their losses over num_targets"
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

    def _checked(self, whole: _Part) -> Verdict | None:
        """None where it has still to be found out: two rows at once may not fit where one does."""
        try:
            return self._check(whole)
        except Exception as error:
            if memory_failure(error) != "device":
                raise
        self._drop_gradients()
        release_memory(self._protection.device)
        return None

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
            ProbeSamples(both, first, second, masked, both.loss_weight),
            mean_by="forward" if self.loss is None else "loss function",
        )
        if not verdict.exact:
            warnings.warn(translated(f"fitune: not exact in parts: {verdict.reason}"), stacklevel=5)
        return verdict


def _num_rows(batch: Mapping[str, Any]) -> int:
    """Raises UsageError for what has no rows that can be taken apart."""
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"a batch of SafeStep is a mapping of names to tensors, and this is a {type(batch).__name__}: give names, "
            "like dict(inputs=..., targets=...)"
        )
    num_rows: int | None = None
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            kind = "a single number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UsageError(
                f"'{name}' of the batch is {kind}, not a tensor whose first dimension is its samples: leave it out"
            )
        num_rows = len(value) if num_rows is None else num_rows
        if len(value) != num_rows:
            raise UsageError(
                f"'{name}' of the batch has a first dimension of {len(value)}, and '{next(iter(batch))}' one of "
                f"{num_rows}: the first dimension of every tensor must be the samples"
            )
    if not num_rows:
        raise UsageError("a batch of SafeStep has no sample: leave empty batches out")
    return num_rows


def _own_loss(model: nn.Module, rows: Tensors, num_targets: float) -> Tensor:
    output = model(**rows, num_items_in_batch=num_targets)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"the model put out a {type(output).__name__} without a loss: give SafeStep loss=f, where f(model, "
            "samples, num_targets) is the sum of their losses over num_targets"
        )
    return loss


def _num_labels(rows: Tensors) -> float:
    labels = rows.get("labels")
    if labels is None or labels.dim() < 2:
        shape = "has no labels" if labels is None else "has labels of one dimension"
        raise UsageError(f"the batch {shape}, so its targets cannot be counted: give SafeStep num_targets=f(samples)")
    return float((labels[:, 1:] != -100).sum())
