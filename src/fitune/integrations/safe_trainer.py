"""Provides a `Trainer` whose steps survive running out of memory, with the same results.

The Trainer calls `training_step` for one micro-batch after another, then clips and updates.
`SafeSteps` collects the micro-batches of a step until the last one has arrived, and then computes
them together with `safe_step`: in parts that fit, each by the Trainer's own `training_step`, which
divides by the targets of the whole batch. After a failure it drops the gradients and begins the
step again in smaller parts. Batch, data order, clipping, optimizer and schedule remain the
Trainer's.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fitune.errors import OutOfMemoryError, UsageError
from fitune.integrations.rows import Samples, most_different_samples, without_targets
from fitune.integrations.versions import check_alone, check_trainer
from fitune.language import translated
from fitune.machine.out_of_memory import try_twice
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.recovery.observed import allocatable_bytes, fitted_step
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import MemoryModel
from fitune.recovery.step import SafeResult
from fitune.step.optimizer_state import create_state
from fitune.step.progress import Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part(Samples):
    """Some samples of one of the Trainer's micro-batches.

    `tensors` are the inputs of `training_step`. If they have no common first dimension, they
    count as one sample.
    """

    @property
    def loss_weight(self) -> float:
        # any positive number would do, since the Trainer counts the targets itself
        return float(len(self.row_ids))

    @property
    def num_positions(self) -> int:
        """The number of elements of the largest tensor."""
        return max(value.numel() for value in self.tensors.values() if isinstance(value, Tensor))


class _NoUpdate(torch.optim.Optimizer):
    """An optimizer that leaves parameters and `.grad` alone: the Trainer clips and updates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class SafeSteps(Trainer):  # type: ignore[misc]
    """A Trainer whose steps survive running out of memory, or a mixin for another Trainer.

        class SafeSFTTrainer(SafeSteps, SFTTrainer): pass

    The first step raises UsageError for a Trainer whose results it could not preserve exactly.
    Raises OutOfMemoryError where one sample does not fit alone; that step then changes nothing.
    """

    #: the result of the last step
    safe_result: SafeResult | None = None
    #: whether the loss may be computed in parts, checked on two samples of the first step;
    #: where it may not, micro-batches are not split
    safe_verdict: Verdict | None = None

    _waiting: list[_Part]
    _protection: Protection[_Part]
    _memory: MemoryModel | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, object],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of the whole step after its last micro-batch, and 0 after the others."""
        inputs = self._prepare_inputs(inputs)
        if self._memory is None:
            self._begin(model, inputs, num_items_in_batch)
        first = self._waiting[-1].row_ids[-1] + 1 if self._waiting else 0
        exact = self.safe_verdict is not None and self.safe_verdict.exact
        # a micro-batch that may not be split counts as one sample
        num_rows = _num_rows(inputs) if exact else 1
        self._waiting.append(_Part(tuple(range(first, first + num_rows)), inputs))
        if len(self._waiting) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        parts, self._waiting = self._waiting, []
        return self._compute_step(parts, num_items_in_batch)

    def _begin(
        self, model: nn.Module, inputs: Mapping[str, object], num_items: Tensor | int | None
    ) -> None:
        """Prepare the first step: check the Trainer, create the optimizer's state, set the verdict.

        Raises UsageError for a Trainer that is not supported.
        """
        check_trainer(self)
        check_alone(self)
        for name in ("auto_find_batch_size", "activation_offloading"):
            if getattr(self.args, name, False):
                raise UsageError(
                    f"{name}=True cannot be used with SafeSteps, which keeps the batch: set it to False"
                )
        work: Work[_Part] = Work(
            model=model,
            optimizer=_NoUpdate(model),
            scaler=None,
            loss_share=lambda part, _: self._forward_and_backward(part, self._num_items),
            split=_Part.split,
            without=_Part.without,
            clip=0.0,
            commit=False,
        )
        self._waiting, self._failed = [], False
        self._num_items, self._logged_metrics = num_items, _LoggedMetrics(self)
        self._protection = Protection(
            work=work,
            seed=self.args.seed,
            query_free_bytes=partial(allocatable_bytes, self.args.device),
        )
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        try_twice(
            lambda: create_state(optimizer), device=self.args.device, what="the optimizer's state"
        )
        looking = "a look at two samples"
        self.safe_verdict = try_twice(
            lambda: self._check(inputs), device=self.args.device, what=looking
        )
        self._logged_metrics.put_back()
        if not self.safe_verdict.exact:
            log.warning(
                "%s", translated(f"fitune: micro-batches stay whole: {self.safe_verdict.reason}")
            )
        self._memory = MemoryModel(planned=1)

    def _check(self, inputs: Mapping[str, object]) -> Verdict:
        """Check on two samples whether the loss may be computed in parts.

        Takes the two samples that differ most in their number of targets.
        """
        if self._num_items is None:
            return Verdict(
                False, "the Trainer divides by no number of targets (num_items_in_batch)"
            )
        whole = _Part(tuple(range(_num_rows(inputs))), inputs)
        chosen = most_different_samples(whole, _num_targets)
        if chosen is None:
            return Verdict(
                True, "not looked at: the first micro-batch has no two samples with targets"
            )
        both, first, second = chosen
        masked = _Part(first.row_ids, without_targets(first.tensors))
        return check_model(
            self._protection.work.model,
            lambda part, weight: self._forward_and_backward(
                part, torch.tensor(weight, device=self.args.device)
            ),
            ProbeSamples(both, first, second, masked, float(_num_targets(both))),
            mean_by="forward",
        )

    def _compute_step(self, parts: list[_Part], num_items: Tensor | int | None) -> Tensor:
        """Leave the gradients of all parts in `.grad`, and return the loss of the step."""
        assert self._memory is not None
        self._num_items, self._logged_metrics = num_items, _LoggedMetrics(self)
        step = self.state.global_step + 1
        try:
            result = fitted_step(
                self._memory,
                self._protection,
                lambda most_positions: [
                    piece for part in parts for piece in part.split(most_positions)
                ],
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

    def _forward_and_backward(self, part: _Part, num_items: object) -> Tensor:
        """Run the Trainer's own `training_step` on these samples, and return its loss.

        The gradients are in `.grad` afterwards; the returned loss has no graph.
        """
        # the step begins again, so the metrics that its first attempt logged must not count
        if self._failed:
            self._logged_metrics.put_back()
        self._failed = True
        loss: Tensor = super().training_step(
            self._protection.work.model, dict(part.tensors), num_items
        )
        self._failed = False
        return loss.detach().float().requires_grad_()


class _LoggedMetrics:
    """A copy of the metrics that TRL collects in each forward for its log."""

    def __init__(self, trainer: object) -> None:
        self._trainer = trainer
        names = ("_metrics", "_total_train_tokens")
        self._saved = {
            name: copy.deepcopy(vars(trainer)[name]) for name in names if name in vars(trainer)
        }

    def put_back(self) -> None:
        vars(self._trainer).update(copy.deepcopy(self._saved))


def _num_rows(inputs: Mapping[str, object]) -> int:
    """Return the number of samples: 1 if the tensors have no common first dimension.

    They have none where samples are packed into one row.
    """
    sizes = {
        value.shape[0] if value.dim() else 0
        for value in inputs.values()
        if isinstance(value, Tensor)
    }
    return sizes.pop() if len(sizes) == 1 else 1


def _num_targets(part: _Part) -> int:
    labels = part.tensors.get("labels")
    return 0 if labels is None else int((labels[..., 1:] != -100).sum())
