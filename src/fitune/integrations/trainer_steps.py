"""Measures a Trainer's steps by hooks on its model.

The hooks count the samples and tokens of each forward and read the squared norms of the gradients,
from which batch_size/noise.py computes the gradient noise.

A step begins with a forward before which no parameter has a gradient; it begins again if its
gradients were dropped. The hooks read the summed gradient right after the last backward, because a
callback sees it only after clipping.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fitune.batch_size.noise import PRECONDITIONED_EVERY
from fitune.batch_size.norms import GradientNorms, NormRecorder


@dataclass(frozen=True, slots=True)
class SeenStep:
    """What the hooks measured of one step, or of several."""

    #: the samples of the largest forward
    rows: int = 0
    #: padding included
    tokens: int = 0
    supervised_tokens: int = 0
    num_forwards: int = 0
    #: None where the gradient is not finite or was not read
    norms: GradientNorms | None = None

    def with_step(self, step: "SeenStep") -> "SeenStep":
        """Return the sum of both, without norms."""
        return SeenStep(
            max(self.rows, step.rows),
            self.tokens + step.tokens,
            self.supervised_tokens + step.supervised_tokens,
            self.num_forwards + step.num_forwards,
        )


@dataclass(frozen=True, slots=True)
class _Forward:
    """What the hooks measured of one forward."""

    rows: int
    tokens: int
    #: on the device, so that the host does not wait for it
    num_targets: Tensor
    #: whether the gradient is divided by the targets of the whole step; if not, every forward
    #: of the step has the same weight
    shares_targets: bool


class StepReader:
    """Hooks on a Trainer's model that measure its steps.

    clip: the largest gradient norm that the Trainer allows, 0 for no clipping.
    noise: whether gradients are read.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float, noise: bool
    ) -> None:
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        self._optimizer, self._clip, self._noise = optimizer, clip, noise
        self._forwards: list[_Forward] = []
        self._eval_targets: Tensor | int = 0
        self._recorder: NormRecorder | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._num_steps = 0
        self._hooks, self._reading = ExitStack(), ExitStack()
        self._hooks.callback(self._reading.close)
        self._hooks.callback(model.register_forward_pre_hook(self._see, with_kwargs=True).remove)
        for parameter in self._parameters if noise else ():
            self._hooks.callback(
                parameter.register_post_accumulate_grad_hook(self._read_sum).remove
            )

    def close(self) -> None:
        self._hooks.close()

    def take(self) -> SeenStep:
        """Return the measurements of the step, and begin the next one.

        Call it after the last backward and before the optimizer uses the gradients; they may be
        clipped already.
        """
        self._finish_backward()
        forwards, self._forwards = self._forwards, []
        self._num_steps += 1
        targets = [forward.num_targets.float() for forward in forwards]
        values = [] if self._recorder is None or not self._sums else [self._recorder.values()]
        sums = [torch.stack(list(self._sums.values())).square().sum()[None]] if values else []
        self._sums = {}
        host = (
            torch.cat([*sums, *[each[None] for each in targets], *values]).tolist()
            if targets
            else []
        )
        num_targets = host[len(sums) : len(sums) + len(targets)]
        norms = None
        if sums and self._recorder is not None and math.isfinite(host[0]):
            shares = all(forward.shares_targets for forward in forwards)
            weights = num_targets if shares else [sum(num_targets) / len(targets)] * len(targets)
            norms = self._norms(
                self._recorder, host[len(sums) + len(targets) :], scaled_square=host[0]
            )
            norms = replace(norms, weights=tuple(weights))
        return SeenStep(
            rows=max((forward.rows for forward in forwards), default=0),
            tokens=sum(forward.tokens for forward in forwards),
            supervised_tokens=int(sum(num_targets)),
            num_forwards=len(forwards),
            norms=norms,
        )

    def take_evaluation(self) -> int:
        """Return the number of targets in evaluation forwards since the last call."""
        taken, self._eval_targets = int(self._eval_targets), 0
        return taken

    def _see(
        self, model: nn.Module, arguments: tuple[object, ...], inputs: dict[str, object]
    ) -> None:
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if not isinstance(ids, Tensor):
            return
        num_targets = torch.zeros((), dtype=torch.int64, device=ids.device)
        if isinstance(labels, Tensor):
            num_targets = (labels[..., 1:] != -100).sum()
        if not model.training:
            self._eval_targets = self._eval_targets + num_targets
        elif torch.is_grad_enabled():
            shares_targets = (
                inputs.get("num_items_in_batch") is not None or "fused_lm_head" in inputs
            )
            self._begin(_Forward(ids.shape[0], ids.numel(), num_targets, shares_targets))

    def _begin(self, forward: _Forward) -> None:
        self._reading.close()
        again = all(parameter.grad is None for parameter in self._parameters)
        if again:
            self._forwards, self._sums, self._recorder = [], {}, None
        else:
            self._finish_backward()
        self._forwards.append(forward)
        if self._noise and (again or self._recorder is not None):
            if self._recorder is None:
                preconditioned = self._num_steps > 0 and self._num_steps % PRECONDITIONED_EVERY == 0
                self._recorder = NormRecorder(self._optimizer, preconditioned=preconditioned)
            self._reading.enter_context(self._recorder.reading())

    def _finish_backward(self) -> None:
        """Store the norms that were read in the backward of the last forward."""
        self._reading.close()
        if self._recorder is not None and self._forwards:
            # a weight of 0, since the number of targets is not on the host yet
            self._recorder.keep(0.0)

    def _read_sum(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._sums[parameter] = torch.linalg.vector_norm(
                parameter.grad.detach(), dtype=torch.float32
            )

    def _norms(
        self, recorder: NormRecorder, host: list[float], *, scaled_square: float
    ) -> GradientNorms:
        """Return the norms, with those of the summed gradient corrected for clipping and scaling.

        host: the recorder's values, whose sums are of gradients that may be clipped.
        scaled_square: the squared norm of the summed gradient before clipping, times the square of
        the gradient scaler's scale.
        """
        scaler = getattr(self._optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        norm = math.sqrt(scaled_square) / scale
        # clipping removes the scaler's factor; without clipping it is still in the gradients
        factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else scale
        norms = recorder.read(host, total_norm=norm, scale=scale)
        dot, total = norms.momentum_dot, norms.preconditioned_total
        return replace(
            norms,
            momentum_dot=None if dot is None else dot / factor,
            preconditioned_total=None if total is None else total / factor**2,
        )
