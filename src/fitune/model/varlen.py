"""Call torch's kernel for packed samples, `torch.nn.attention.varlen`, with little Python around it.

`varlen_attn` is an operator that is written in Python: each call passes several of torch's own
Python functions, forward and backward, and its backward fills zeros for outputs that have no
gradient. Here the functions that these operators consist of are called directly, except where
something watches operators: a recording or selective checkpointing sees the operators as a whole.

    T  tokens of all packed samples    H  query heads    G  heads of keys and values    D  head size
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fitune.errors import ModelError


class PackedSamples(NamedTuple):
    """What the kernel must know of packed samples, and how it scores them."""

    #: where the samples begin, and the end: int32 [samples + 1]
    cumulative: Tensor
    #: tokens of the longest sample
    longest: int
    #: by which scores are multiplied; None for one over the root of D
    scale: float | None
    #: the tokens that a token sees, itself included; None for all before it
    window: int | None

    @property
    def window_size(self) -> tuple[int, int]:
        """The tokens before and after a token that it sees, as torch counts them; -1 for all."""
        return (-1 if self.window is None else self.window - 1), 0


def attend_packed(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, samples: PackedSamples
) -> Tensor:
    """Return the attention of each sample to itself, [T, H, D]."""
    if kernels() is not None:
        return cast(Tensor, _Attend.apply(query_THD, key_TGD, value_TGD, samples))  # type: ignore[no-untyped-call]
    accepted = _parameters(varlen_attn())
    options: dict[str, object] = {"scale": samples.scale}
    if "enable_gqa" in accepted:
        options["enable_gqa"] = query_THD.shape[1] != key_TGD.shape[1]
    else:
        repeats = query_THD.shape[1] // key_TGD.shape[1]
        key_TGD, value_TGD = (
            part.repeat_interleave(repeats, dim=1) for part in (key_TGD, value_TGD)
        )
    if "window_size" in accepted:
        options["window_size"] = samples.window_size
    else:
        if samples.window is not None and samples.window < samples.longest:
            raise ModelError(
                "this torch has no sliding window for packed samples on CUDA: update torch or add flash-attn"
            )
        options["is_causal"] = True
    lengths = (samples.cumulative, samples.cumulative, samples.longest, samples.longest)
    return cast(Tensor, varlen_attn()(query_THD, key_TGD, value_TGD, *lengths, **options))


class VarlenKernels(NamedTuple):
    """torch's two operators for packed samples, as decorated Python functions."""

    forward: object
    backward: object

    def attend(
        self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, samples: PackedSamples
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention [T, H, D], and two tensors that the backward needs.

        Call this inside an autograd function: autograd does not see it.
        """
        window = samples.window_size
        lengths = samples.cumulative, samples.cumulative, samples.longest, samples.longest
        found = _called(self.forward)(
            *(query_THD, key_TGD, value_TGD, *lengths, window == (-1, 0)),
            *(samples.scale, list(window), query_THD.shape[1] != key_TGD.shape[1]),
        )
        return cast(tuple[Tensor, Tensor, Tensor], found)

    def differentiate(
        self, grad_THD: Tensor, saved: tuple[Tensor, ...], samples: PackedSamples
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value.

        saved: query, key, value, and the three results of `attend`.
        """
        *rest, random_state = saved
        window = samples.window_size
        lengths = samples.cumulative, samples.cumulative, samples.longest, samples.longest
        found = _called(self.backward)(
            *(grad_THD, *rest, *lengths, window == (-1, 0), random_state),
            *(samples.scale, list(window)),
        )
        return cast(tuple[Tensor, Tensor, Tensor], found)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, samples: PackedSamples
    ) -> Tensor:
        parts = query_THD, key_TGD, value_TGD
        attended = cast(VarlenKernels, kernels()).attend(*parts, samples)
        ctx.save_for_backward(*parts, *attended)
        ctx.samples = samples
        return attended[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_THD,) = grad_outputs
        found = cast(VarlenKernels, kernels()).differentiate(
            grad_THD, ctx.saved_tensors, ctx.samples
        )
        return *found, None


def _called(operator: Any) -> Callable[..., object]:
    """Return what is called for an operator: the function it consists of, unless it is watched."""
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    return cast(Callable[..., Any], operator if is_watched else operator._init_fn)


#: the parameters of the two operators that are passed here, in their order
_PASSED = (
    "query key value cu_seq_q cu_seq_k max_q max_k is_causal scale window_size enable_gqa",
    "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale "
    "window_size",
)


@functools.cache
def kernels() -> VarlenKernels | None:
    """Return torch's operators; None for a torch whose operators are others."""
    from torch.nn.attention import varlen

    found = VarlenKernels(
        *(getattr(varlen, f"_varlen_attn{end}", None) for end in ("", "_backward"))
    )
    for operator, passed in zip(found, _PASSED, strict=True):
        function, names = getattr(operator, "_init_fn", None), passed.split()
        if function is None or _parameters(function)[: len(names)] != names:
            return None
    return found


@functools.cache
def varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.cache
def _parameters(function: Callable[..., object]) -> list[str]:
    """Return the names of its parameters, which differ between torch's versions.

    is_causal came in 2.10, window_size and enable_gqa later.
    """
    return list(inspect.signature(function).parameters)


def has_window() -> bool:
    """Return whether this torch's `varlen_attn` knows sliding windows."""
    return "window_size" in _parameters(varlen_attn())
