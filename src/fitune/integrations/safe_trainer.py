"""A `Trainer` whose steps running out of memory neither changes nor ends.

The Trainer calls `training_step` for one micro-batch after another, then clips and updates. Here the micro-batches of a
step are kept until its last one has come, and then computed together by `safe_step`: in parts that fit, each by the
Trainer's own `training_step`, which divides by the targets of the whole batch. After a failure gradients are dropped
and the step begins again in smaller parts. Batch, data order, clipping, optimizer and schedule stay the Trainer's.
"""

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fitune.errors import OutOfMemoryError, UsageError
from fitune.integrations.versions import check_alone, check_trainer
from fitune.language import translated
from fitune.machine.out_of_memory import try_twice
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.recovery.observed import fitted_step, room_bytes
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import MemoryModel
from fitune.recovery.step import SafeResult
from fitune.step.optimizer_state import create_state
from fitune.step.progress import Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """Rows of one of the Trainer's micro-batches. inputs: what `training_step` takes; every tensor's first dimension is
    the rows, or there is one row. loss_weight: any positive number, since the Trainer counts targets itself."""

    row_ids: tuple[int, ...]
    inputs: Mapping[str, Any]

    @property
    def loss_weight(self) -> float:
        return float(len(self.row_ids))

    @property
    def num_positions(self) -> int:
        return max(value.numel() for value in self.inputs.values() if isinstance(value, Tensor))


class _Kept(torch.optim.Optimizer):
    """The end of `safe_step` for gradients that stay in `.grad`: the Trainer clips and updates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class SafeSteps(Trainer):  # type: ignore[misc]
    """A Trainer, or mixed in before another: `class SafeSFTTrainer(SafeSteps, SFTTrainer): pass`.

    safe_result: of the last step. safe_verdict: whether the loss may be computed in parts, seen on two rows of the
    first step; where it may not, micro-batches stay whole. Raises UsageError at the first step for what it cannot keep
    exact, and OutOfMemoryError where a row does not fit alone; nothing of that step is done then.
    """

    safe_result: SafeResult | None = None
    safe_verdict: Verdict | None = None

    _waiting: list[_Part]
    _protection: Protection[_Part]
    _memory: MemoryModel | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of the whole step after its last micro-batch, 0 after the others."""
        inputs = self._prepare_inputs(inputs)
        if self._memory is None:
            self._begin(model, inputs, num_items_in_batch)
        first = self._waiting[-1].row_ids[-1] + 1 if self._waiting else 0
        exact = self.safe_verdict is not None and self.safe_verdict.exact
        self._waiting.append(_Part(tuple(range(first, first + (_num_rows(inputs) if exact else 1))), inputs))
        if len(self._waiting) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        parts, self._waiting = self._waiting, []
        return self._safe(parts, num_items_in_batch)

    def _begin(self, model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> None:
        check_trainer(self)
        check_alone(self)
        for name in ("auto_find_batch_size", "activation_offloading"):
            if getattr(self.args, name, False):
                raise UsageError(f"{name}=True cannot be used with SafeSteps, which keeps the batch: set it to False")
        work = Work(
            model=model,
            optimizer=_Kept(model),
            scaler=None,
            loss_share=lambda part, _: self._forward_and_backward(part, self._num_items),
            split=_split,
            without=_without,
            clip=0.0,
            commit=False,
        )
        self._waiting, self._failed = [], False
        self._num_items, self._books = num_items, _Books(self)
        self._protection = Protection(work=work, seed=self.args.seed, room=partial(room_bytes, self.args.device))
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        try_twice(lambda: create_state(optimizer), device=self.args.device, what="the optimizer's state")
        looking = "a look at two samples"
        self.safe_verdict = try_twice(lambda: self._check(inputs), device=self.args.device, what=looking)
        self._books.put_back()
        if not self.safe_verdict.exact:
            log.warning("%s", translated(f"fitune: micro-batches stay whole: {self.safe_verdict.reason}"))
        self._memory = MemoryModel(planned=1)

    def _check(self, inputs: Mapping[str, Any]) -> Verdict:
        """Of the two rows that differ most in their number of targets."""
        if self._num_items is None:
            return Verdict(False, "the Trainer divides by no number of targets (num_items_in_batch)")
        whole = _Part(tuple(range(_num_rows(inputs))), inputs)
        rows = sorted((_take(whole, [place]) for place in range(len(whole.row_ids))), key=_num_targets)
        rows = [row for row in rows if _num_targets(row)]
        if len(rows) < 2:
            return Verdict(True, "not looked at: the first micro-batch has no two samples with targets")
        first, second = rows[0], rows[-1]
        both = _take(whole, [first.row_ids[0], second.row_ids[0]])
        masked = _Part(first.row_ids, {**first.inputs, "labels": torch.full_like(first.inputs["labels"], -100)})
        return check_model(
            self._protection.work.model,
            lambda part, weight: self._forward_and_backward(part, torch.tensor(weight, device=self.args.device)),
            ProbeSamples(both, first, second, masked, float(_num_targets(both))),
            mean_by="forward",
        )

    def _safe(self, parts: list[_Part], num_items: Tensor | int | None) -> Tensor:
        assert self._memory is not None
        self._num_items, self._books = num_items, _Books(self)
        step = self.state.global_step + 1
        try:
            result = fitted_step(
                self._memory,
                self._protection,
                lambda most_positions: [piece for part in parts for piece in _split(part, most_positions)],
                step=step,
                most_positions=max(part.num_positions for part in parts),
                row_positions=max(part.num_positions // len(part.row_ids) for part in parts),
            )
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"step {step} does not fit, however small its parts: set activation_checkpointing=True, a smaller "
                f"max_length or fewer trainable parameters ({error})"
            ) from error
        for failure in result.failures:
            log.warning("fitune: step %d: %s", step, failure)
        self.safe_result = result
        return torch.tensor(result.step.loss, device=self.args.device)

    def _forward_and_backward(self, part: _Part, num_items: Any) -> Tensor:
        """The Trainer's own step on these rows. Gradients are in `.grad`; no graph is behind what is returned."""
        if self._failed:  # the step begins again, and so does what the Trainer notes down in it
            self._books.put_back()
        self._failed = True
        loss: Tensor = super().training_step(self._protection.work.model, dict(part.inputs), num_items)
        self._failed = False
        return loss.detach().float().requires_grad_()


class _Books:
    """What TRL notes down in each forward, for its log."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        names = ("_metrics", "_total_train_tokens")
        self._kept = {name: copy.deepcopy(vars(trainer)[name]) for name in names if name in vars(trainer)}

    def put_back(self) -> None:
        vars(self._trainer).update(copy.deepcopy(self._kept))


def _num_rows(inputs: Mapping[str, Any]) -> int:
    """1 for rows that are packed into one, which have no common first dimension."""
    sizes = {value.shape[0] if value.dim() else 0 for value in inputs.values() if isinstance(value, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 1


def _num_targets(part: _Part) -> int:
    labels = part.inputs.get("labels")
    return 0 if labels is None else int((labels[..., 1:] != -100).sum())


def _take(part: _Part, places: Sequence[int]) -> _Part:
    inputs = {name: value[list(places)] if isinstance(value, Tensor) else value for name, value in part.inputs.items()}
    return _Part(tuple(part.row_ids[place] for place in places), inputs)


def _split(part: _Part, most_positions: int) -> list[_Part]:
    at_once = max(most_positions * len(part.row_ids) // part.num_positions, 1)
    places = range(len(part.row_ids))
    if at_once >= len(places):
        return [part]
    return [_take(part, places[first : first + at_once]) for first in range(0, len(places), at_once)]


def _without(part: _Part, row_ids: Collection[int]) -> _Part | None:
    kept = [place for place, row in enumerate(part.row_ids) if row not in row_ids]
    return _take(part, kept) if kept else None
