"""Gives a training loop that is not fitune's an optimizer step that survives running out of memory.

`SafeStep` takes the place of forward, backward, clipping and update in such a loop.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitune.boundary import bounded
from fitune.errors import UsageError
from fitune.integrations.rows import Samples, most_different_samples, without_targets
from fitune.language import translated
from fitune.machine.out_of_memory import memory_failure, release_memory, try_twice
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.recovery.observed import allocatable_bytes, fitted_step
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import MemoryModel
from fitune.recovery.step import SafeResult
from fitune.step.optimizer_state import create_state
from fitune.step.progress import Work

Tensors = Mapping[str, Tensor]
#: loss(model, samples, num_targets) returns the sum of the samples' target losses / num_targets
Loss = Callable[[nn.Module, Tensors, float], Tensor]


@dataclass(frozen=True)
class _Part(Samples):
    """Some samples of a batch, weighted by their number of targets."""

    count_targets: Callable[[Tensors], float]
    loss_weight: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_weight", float(self.count_targets(self.tensors)))

    @property
    def num_positions(self) -> int:
        """The number of elements of the first tensor."""
        first: Tensor = next(iter(self.tensors.values()))
        return first.numel()


@dataclass
class SafeStep:
    """An optimizer step on one batch that running out of memory neither changes nor ends.

        safe_step = fitune.SafeStep(model, optimizer)
        for batch in loader:
            safe_step(batch)

    A batch is a mapping of tensors whose first dimension is the samples. SafeStep computes it
    whole if it fits, else in as many parts as needed, and the parts' gradients add up to the
    gradient of the whole batch.

    The first call that gets two samples with targets checks on them whether the loss may be
    computed in parts, and warns if it may not (see `verdict`). Raises OutOfMemoryError where one
    sample alone does not fit; nothing is changed then. Raises UsageError for a model, optimizer
    or batch that cannot be computed again in parts. An exception raised by the model, by `loss`
    or by `num_targets` passes through unchanged.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    #: see `Loss`; None for the model's own, which transformers computes with num_items_in_batch
    loss: Loss | None = None
    #: counts the targets of some samples; None counts the labels[:, 1:] that are not -100
    num_targets: Callable[[Tensors], float] | None = None
    #: the largest gradient norm, 0 for no clipping
    clip: float = 1.0
    #: see `StepSettings.commit`
    commit: bool = False
    #: the most samples that a part may have; None tries the whole batch first
    most_rows: int | None = None
    scaler: torch.amp.GradScaler | None = None
    seed: int = 0
    #: whether the loss may be computed in parts; None until two samples were checked
    verdict: Verdict | None = field(default=None, init=False)
    #: the number of calls so far
    steps: int = field(default=0, init=False)

    @bounded("fitune.SafeStep", calls_back=True)
    def __post_init__(self) -> None:
        self._refuse_what_cannot_be_repeated()
        work: Work[_Part] = Work(
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            loss_share=self._loss_share,
            split=_Part.split,
            without=_Part.without,
            clip=self.clip,
            commit=self.commit,
        )
        self._protection: Protection[_Part] = Protection(
            work=work,
            seed=self.seed,
            query_free_bytes=lambda: allocatable_bytes(self._protection.device),
        )
        self._memory: MemoryModel | None = None

    @bounded("fitune.SafeStep", calls_back=True)
    def __call__(self, batch: Mapping[str, Any]) -> SafeResult:
        """Compute the gradients of the batch and update the model.

        Every `.grad` is None before and after. The caller steps a learning rate schedule itself,
        after each call.
        """
        self._drop_gradients()
        device, num_rows = self._protection.device, _num_rows(batch)
        tensors = {name: value.to(device) for name, value in batch.items()}
        whole = _Part(tuple(range(num_rows)), tensors, self.num_targets or _num_labels)
        if self._memory is None:
            try_twice(
                lambda: create_state(self.optimizer), device=device, what="the optimizer's state"
            )
            self._memory = MemoryModel(planned=1)
        if self.verdict is None:
            self.verdict = self._check_if_it_fits(whole)
        self.steps += 1
        row_positions = whole.num_positions // num_rows
        result = fitted_step(
            self._memory,
            self._protection,
            whole.split,
            step=self.steps,
            most_positions=row_positions * min(self.most_rows or num_rows, num_rows),
            row_positions=row_positions,
        )
        self._drop_gradients()
        return result

    def _loss_share(self, part: _Part, weight: float) -> Tensor:
        loss = (self.loss or _own_loss)(self.model, part.tensors, weight)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = (
                f"a tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            raise UsageError(
                f"the loss of SafeStep is {found}: return a tensor of one element, with its graph"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise UsageError(
                "the loss of SafeStep leads to no parameter that is trained: compute it without detach(), .item() and "
                "no_grad(), from parameters with requires_grad=True"
            )
        return loss

    def _drop_gradients(self) -> None:
        # of the model, not of the optimizer: another backward may have left gradients in
        # parameters that the optimizer does not update
        self.model.zero_grad(set_to_none=True)

    def _refuse_what_cannot_be_repeated(self) -> None:
        """Raise UsageError for a model or optimizer whose step cannot be computed again."""
        if isinstance(self.model, DistributedDataParallel):
            raise UsageError(
                "SafeStep got a DistributedDataParallel, whose processes wait for each other in every backward, so "
                "that none can repeat one alone: use `torchrun -m fitune train`, or its .module in one process"
            )
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise UsageError(
                "SafeStep got LBFGS, which computes the loss several times in an update: use AdamW or SGD"
            )
        known = {id(parameter) for parameter in self.model.parameters()}
        others = sum(
            id(each) not in known
            for group in self.optimizer.param_groups
            for each in group["params"]
        )
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

    def _check_if_it_fits(self, whole: _Part) -> Verdict | None:
        """Return what `_check` returns, or None where two samples at once do not fit."""
        try:
            return self._check(whole)
        except Exception as error:
            if memory_failure(error) != "device":
                raise
        self._drop_gradients()
        release_memory(self._protection.device)
        return None

    def _check(self, whole: _Part) -> Verdict | None:
        """Check on two samples whether the loss may be computed in parts.

        Takes the two that differ most in their number of targets. Returns None where fewer than
        two samples have targets. Warns where the loss may not be computed in parts.
        """
        chosen = most_different_samples(whole, lambda part: part.loss_weight)
        if chosen is None:
            return None
        both, first, second = chosen
        masked = None
        if self.loss is None:
            masked = replace(
                first, tensors=without_targets(first.tensors), count_targets=lambda _: 0.0
            )
        verdict = check_model(
            self.model,
            self._protection.work.loss_share,
            ProbeSamples(both, first, second, masked, both.loss_weight),
            mean_by="forward" if self.loss is None else "loss function",
        )
        if not verdict.exact:
            warnings.warn(translated(f"fitune: not exact in parts: {verdict.reason}"), stacklevel=5)
        return verdict


def _num_rows(batch: Mapping[str, object]) -> int:
    """Return the number of samples. Raises UsageError for a batch that has no samples to split."""
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


def _own_loss(model: nn.Module, samples: Tensors, num_targets: float) -> Tensor:
    """Return the loss that a model of transformers computes itself, see `Loss`."""
    output = model(**samples, num_items_in_batch=num_targets)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"the model put out a {type(output).__name__} without a loss: give SafeStep loss=f, where f(model, "
            "samples, num_targets) is the sum of their losses over num_targets"
        )
    return loss


def _num_labels(samples: Tensors) -> float:
    labels = samples.get("labels")
    if labels is None or labels.dim() < 2:
        shape = "has no labels" if labels is None else "has labels of one dimension"
        raise UsageError(
            f"the batch {shape}, so its targets cannot be counted: give SafeStep num_targets=f(samples)"
        )
    return float((labels[:, 1:] != -100).sum())
