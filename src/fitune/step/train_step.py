"""THE training step: forward and backward over micro-batches, clip, update. It is trained, evaluated against and
recorded for the memory prediction; there is no second one.

The loss of every micro-batch is its sum of token losses divided by the weight N of the *whole* effective batch, so the
gradient does not depend on how the rows are split. One transfer to the host, before the update, so that a gradient that
is not finite never reaches the weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fitune.data.rows import MicroBatch
from fitune.errors import RestartError
from fitune.step.gradient_norms import GradientNorms, NormRecorder
from fitune.step.loss import LossSettings, losses_and_correct, token_loss_sum
from fitune.step.out_of_memory import memory_failure
from fitune.step.shards import Shards

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """clip: the largest gradient norm, 0 for none. autocast: the dtype of matrix products, None for the parameters'.

    commit: gradients of complete micro-batches are kept apart, so that one that fails is done again alone, and the
    update can be undone; else a failure begins the step again, which needs no memory. For few trainable parameters.
    shards: of a model that is dealt over several processes.
    """

    loss: LossSettings
    clip: float = 1.0
    autocast: torch.dtype | None = None
    commit: bool = False
    shards: Shards | None = None

    def run(self, device: torch.device, compute: Callable[[], T]) -> T:
        """What it computes with the model, in these settings."""
        with autocast(device, self.autocast):
            return compute() if self.shards is None else self.shards.run(compute)


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean over the loss weight N of the effective batch. grad_norm: before clipping.

    updated is False when the batch had no target (N = 0), the gradient was not finite, or a float16 gradient overflowed
    and the scaler lowers its scale; `loss` is None in the first case. norms: of the micro-batches' gradients, where a
    recorder was given.
    """

    loss: float | None
    grad_norm: float | None
    loss_weight: float
    updated: bool
    norms: GradientNorms | None = None


NOTHING_TO_LEARN = StepResult(loss=None, grad_norm=None, loss_weight=0.0, updated=False)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """num_correct: tokens predicted right, of num_supervised_tokens. row_losses, row_weights: the weighted sum of token
    losses and the sum of weights of each row, in the order of the row ids, however the rows were laid out."""

    row_ids: tuple[int, ...]
    loss_weight: float
    num_correct: int
    num_supervised_tokens: int
    row_losses: tuple[float, ...]
    row_weights: tuple[float, ...]

    @property
    def loss_sum(self) -> float:
        return math.fsum(self.row_losses)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.loss_weight

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a double

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_supervised_tokens


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    settings: StepSettings,
    scaler: torch.amp.GradScaler | None = None,
    norms: NormRecorder | None = None,
) -> StepResult:
    """One optimizer step on one effective batch, given as its micro-batches.

    `.grad` is None before and after. scaler: for float16 autocast only. norms: reads this step's gradients. `safe_step`
    does the same, of the same parts, and survives running out of memory between them.
    """
    loss_weight = sum(micro_batch.loss_weight for micro_batch in micro_batches)
    if loss_weight == 0:
        return NOTHING_TO_LEARN
    committed = CommitBuffer(model) if settings.commit else None
    losses = []
    for micro_batch in micro_batches:
        loss = loss_share(model, micro_batch, loss_weight=loss_weight, settings=settings)
        losses.append(backward(loss, scaler, norms, alone=len(micro_batches) == 1))
        if committed is not None:
            committed.add()
        if norms is not None:
            norms.keep(micro_batch.loss_weight)
    if committed is not None:
        committed.hand_over()
    clipped = clip_gradients(optimizer, losses, clip=settings.clip, scaler=scaler, norms=norms)
    updated = update(optimizer, clipped.grad_norm, scaler=scaler, protected=settings.commit)
    return StepResult(clipped.loss, clipped.grad_norm, loss_weight, updated, clipped.norms)


def loss_share(model: nn.Module, micro_batch: MicroBatch, *, loss_weight: float, settings: StepSettings) -> Tensor:
    """What this micro-batch adds to the mean loss of a batch of weight `loss_weight`, with its graph."""
    device = next(model.parameters()).device
    here = micro_batch.to(device)
    return settings.run(device, lambda: token_loss_sum(model, here, settings.loss) / loss_weight)


def backward(
    loss: Tensor, scaler: torch.amp.GradScaler | None, norms: NormRecorder | None = None, *, alone: bool = False
) -> Tensor:
    """The loss without its graph, once that has given its gradients. alone: as `NormRecorder.reading` takes it."""
    with nullcontext() if norms is None else norms.reading(alone=alone):
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
    return loss.detach()


class CommitBuffer:
    """Sums of the gradients of *complete* micro-batches, in float32.

    `.grad` is None before each micro-batch and added after it, so that a backward that fails half-way spoils nothing
    but what is in `.grad`. Costs a gradient's memory, which is little where few parameters are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    @torch.no_grad()
    def add(self) -> None:
        """All of `.grad` or, after any failure, nothing of it: what must be allocated is allocated first."""
        pairs = list(zip(self._sums, self._parameters, strict=True))
        new = [p.grad.float() if total is None and p.grad is not None else None for total, p in pairs]
        old = [(total, p.grad) for total, p in pairs if total is not None and p.grad is not None]
        if old:
            torch._foreach_add_([total for total, _ in old], [gradient for _, gradient in old])
        self._sums = [total if first is None else first for (total, _), first in zip(pairs, new, strict=True)]
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def num_bytes(self) -> int:
        return sum(total.nbytes for total in self._sums if total is not None)

    def filled(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """(the sum of each parameter, zeros where no micro-batch gave a gradient, the places of those)."""
        missing = tuple(place for place, total in enumerate(self._sums) if total is None)
        zeros = [torch.zeros_like(self._parameters[place], dtype=torch.float32) for place in missing]
        for place, zero in zip(missing, zeros, strict=True):
            self._sums[place] = zero
        return [total for total in self._sums if total is not None], missing

    def drop(self, places: Sequence[int]) -> None:
        for place in places:
            self._sums[place] = None

    def hand_over(self) -> None:
        """The sums become `.grad`, in the parameters' data type; this buffer is empty then."""
        for place, parameter in enumerate(self._parameters):
            total, self._sums[place] = self._sums[place], None
            parameter.grad = None if total is None else total.to(parameter.dtype)


class Clipped(NamedTuple):
    """grad_norm: before clipping."""

    loss: float
    grad_norm: float
    norms: GradientNorms | None


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    losses: Sequence[Tensor],
    *,
    clip: float,
    scaler: torch.amp.GradScaler | None,
    norms: NormRecorder | None = None,
    shards: Shards | None = None,
) -> Clipped:
    """Host numbers, in the step's one transfer. Clips `.grad` in place. shards: over which `.grad` is dealt."""
    if scaler is not None:
        if shards is not None:
            shards.ready()  # an overflow in one shard is made known to all in here
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    on_device = [] if norms is None else [norms.values()]
    if shards is None:
        norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    else:
        norm = shards.clip(parameters, clip or math.inf)
    host = torch.cat((torch.stack((torch.stack(list(losses)).sum(), norm.float())), *on_device)).tolist()
    scale = 1.0 if scaler is None else scaler.get_scale()
    read = None if norms is None else norms.read(host[2:], total_norm=host[1], scale=scale)
    return Clipped(host[0], host[1], read)


def update(
    optimizer: torch.optim.Optimizer, grad_norm: float, *, scaler: torch.amp.GradScaler | None, protected: bool
) -> bool:
    """Whether the parameters were updated; not by a gradient that is not finite. `.grad` is None afterwards.

    protected: parameters and optimizer state are copied first and put back if the update fails in its middle. Without
    a copy, running out of memory there raises RestartError, since half an update cannot be undone.
    """
    updated = math.isfinite(grad_norm)
    if scaler is not None or updated:
        before = _Rollback(optimizer) if protected else None
        try:
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        except Exception as error:
            if before is not None:
                before.put_back()
            elif memory_failure(error) is not None:
                raise RestartError(
                    "out of memory in the middle of the optimizer's update, which cannot be undone: start again from "
                    "the last checkpoint; optim.name=adamw needs no memory there"
                ) from error
            raise
    optimizer.zero_grad(set_to_none=True)
    return updated


class _Rollback:
    """A copy of what an optimizer's update changes. Putting it back allocates nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._values = [(parameter, torch.empty_like(parameter)) for parameter in trained]
        self._state = {
            parameter: {
                key: torch.empty_like(value) if isinstance(value, Tensor) else value for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }
        _copy_all([(copy, parameter) for parameter, copy in self._values])
        _copy_all(
            [
                (copy, optimizer.state[parameter][key])
                for parameter, state in self._state.items()
                for key, copy in state.items()
                if isinstance(copy, Tensor)
            ]
        )

    def put_back(self) -> None:
        _copy_all(self._values)
        for parameter in list(self._optimizer.state):
            if parameter not in self._state:
                del self._optimizer.state[parameter]
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = state


@torch.no_grad()
def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Each first one becomes what the second one is, in a few launches for each device."""
    for device in {source.device for _, source in pairs}:
        of_device = [(into, source) for into, source in pairs if source.device == device]
        torch._foreach_copy_([into for into, _ in of_device], [source for _, source in of_device])


def evaluate(model: nn.Module, micro_batches: Iterable[MicroBatch], *, settings: StepSettings) -> EvalResult:
    """Loss and token accuracy over micro-batches, in evaluation mode; the model's own mode is restored."""
    totals = EvalTotals(model, settings)
    with evaluation_mode(model):
        for micro_batch in micro_batches:
            totals.add(micro_batch)
    return totals.result()


class EvalTotals:
    """Sums over the micro-batches of an evaluation, row by row. They stay on the device until `result`."""

    def __init__(self, model: nn.Module, settings: StepSettings) -> None:
        self._model, self._settings = model, settings
        self._device = next(model.parameters()).device
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._row_ids: list[int] = []
        self._sums_2R = [torch.zeros((2, 0), dtype=torch.float64, device=self._device)]
        self._loss_weight, self._num_supervised_tokens = 0.0, 0

    @torch.no_grad()
    def add(self, micro_batch: MicroBatch) -> None:
        """All of the micro-batch or, where that fails, nothing of it."""
        here = micro_batch.to(self._device)
        losses_N, num_correct = self._compute(here)
        sums_2R = sum_by_row(torch.stack((losses_N, here.target_weights_N)), here)
        self._correct += num_correct
        self._sums_2R.append(sums_2R)
        self._row_ids += micro_batch.row_ids
        self._loss_weight += micro_batch.loss_weight
        self._num_supervised_tokens += micro_batch.num_supervised_tokens

    @torch.no_grad()
    def pass_by(self, micro_batch: MicroBatch) -> None:
        """Computed and not counted."""
        self._compute(micro_batch.to(self._device))

    def _compute(self, here: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._settings.run(self._device, lambda: losses_and_correct(self._model, here, self._settings.loss))

    def result(self) -> EvalResult:
        host = torch.cat(self._sums_2R, dim=1).cpu()
        order = sorted(range(len(self._row_ids)), key=self._row_ids.__getitem__)
        row_losses, row_weights = host[:, order].tolist()
        return EvalResult(
            row_ids=tuple(self._row_ids[place] for place in order),
            loss_weight=self._loss_weight,
            num_correct=int(self._correct.item()),
            num_supervised_tokens=self._num_supervised_tokens,
            row_losses=tuple(row_losses),
            row_weights=tuple(row_weights),
        )


def merge_evaluations(parts: Sequence[EvalResult]) -> EvalResult:
    """Of different rows, as one evaluation."""
    if len(parts) == 1:
        return parts[0]
    rows = sorted(row for part in parts for row in zip(part.row_ids, part.row_losses, part.row_weights, strict=True))
    row_ids, row_losses, row_weights = zip(*rows, strict=True) if rows else ((), (), ())
    return EvalResult(
        row_ids=row_ids,
        loss_weight=sum(part.loss_weight for part in parts),
        num_correct=sum(part.num_correct for part in parts),
        num_supervised_tokens=sum(part.num_supervised_tokens for part in parts),
        row_losses=row_losses,
        row_weights=row_weights,
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def sum_by_row(values_KN: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """K values of each target -> their float64 sums over the targets of each row [K, rows]."""
    num_rows = len(micro_batch.row_ids)
    widths = micro_batch.row_lengths if micro_batch.packed else (micro_batch.input_ids_BS.shape[1],) * num_rows
    ends_R = torch.tensor(list(accumulate(widths)), device=values_KN.device)
    row_N = torch.bucketize(micro_batch.target_index_N, ends_R, right=True)
    sums_KR = values_KN.new_zeros((len(values_KN), num_rows), dtype=torch.float64)
    return sums_KR.index_add_(1, row_N, values_KN.double())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
