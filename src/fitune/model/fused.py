"""The same arithmetic as in a model's own layers, in fewer kernels: a small model on a fast card waits for launches.

Each part is replaced only where the model's own code was seen to compute the same. On a CPU, where a launch costs
little, the model's own code runs.
"""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fitune.model import packed_attention as kernels
from fitune.model.fused_linear import fuse_linear_layers


def fuse_layers(model: nn.Module) -> None:
    """Replaces, in place: RMS norms by torch's fused kernel, rotary embeddings by one that does query and key together,
    and linear layers as `fused_linear` says."""
    forwards: dict[object, Callable[..., Any] | None] = {}
    for module in model.modules():
        eps = _eps_of_rms_norm(module)
        key = type(module), eps
        if key not in forwards:
            # the modes of a model that is built on the meta device would put the random numbers there too
            with torch._C.DisableTorchFunction():
                forwards[key] = (
                    _with_fused_rotary(type(module)) if eps is None else _fused_norm_of(module, eps)
                )
        forward = forwards[key]
        if forward is not None:
            module.forward = MethodType(forward, module)
    with torch._C.DisableTorchFunction():
        fuse_linear_layers(model)


# ---- RMS norms -------------------------------------------------------------------------------------------------------


def _eps_of_rms_norm(module: nn.Module) -> float | None:
    """None for a module that is no RMS norm with one weight."""
    if "RMSNorm" not in type(module).__name__ or isinstance(module, nn.RMSNorm):
        return None
    if [*module._parameters] != ["weight"] or module._buffers or module._modules:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, which may be left out
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _fused_norm_of(module: nn.Module, eps: float) -> Callable[..., Any] | None:
    """A forward by torch's kernel; None where the module's own does not compute the same, seen on random numbers."""
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    hidden, weight = _random((4, 16), (16,))
    hidden *= 0.01  # so small that another place of epsilon shows
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        own = type(module).forward(probe, hidden)
    except Exception:  # a norm of another kind
        return None
    if not torch.allclose(
        own, functional.rms_norm(hidden, (16,), weight, eps), rtol=1e-5, atol=1e-6
    ):
        return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        weight = self.weight
        if hidden.dtype != weight.dtype or kernels.compute_capability(hidden) is None:
            return cast(Tensor, type(self).forward(self, hidden))
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # which would return float32 for 16 bits
            return functional.rms_norm(hidden, weight.shape, weight, eps)

    return forward


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        for shape in shapes
    ]


# ---- rotary embeddings -----------------------------------------------------------------------------------------------

_ROTARY = "apply_rotary_pos_emb"
"""The function that transformers' attention layers call: (q, k, cos, sin) -> (q, k)."""


def _with_fused_rotary(layer: type[nn.Module]) -> Callable[..., Any] | None:
    """The layer's own forward with `_FusedRotary` in the place of that function; None where it has another one."""
    forward = layer.forward
    own: Any = getattr(forward, "__globals__", {}).get(_ROTARY)
    if (
        not isinstance(forward, FunctionType)
        or _ROTARY not in forward.__code__.co_names
        or not _is_plain_rotary(own)
    ):
        return None

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or not _is_whole(q, k, cos) or kernels.compute_capability(q) is None:
            return own(q, k, cos, sin, *rest, **options)
        kind = q.device.type  # under autocast, attention would cast the result
        dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else torch.result_type(q, cos)
        )
        if (
            torch.compiler.is_compiling()
        ):  # which fuses it, where parts of one tensor would leave it with copies
            return tuple(each.to(dtype) for each in own(q, k, cos, sin))
        return _FusedRotary.apply(q, k, cos, sin, dtype)  # type: ignore[no-untyped-call]

    known = forward.__globals__ | {_ROTARY: rotary}
    fused = FunctionType(
        forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _is_whole(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Whether all numbers of each head are turned; some models turn the first ones only."""
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[2:] == k.shape[2:]
        and cos.shape[1:] == q.shape[2:]
    )


def _is_plain_rotary(own: Any) -> bool:
    """Whether the function turns the halves of each head, seen on random numbers."""
    q, k, cos, sin = _random((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
    first, second = sin.chunk(2, dim=-1)
    turned = _turn(q, k, cos, (-1, first), (1, second), torch.float32)
    try:
        return all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(own(q, k, cos, sin), turned, strict=True)
        )
    except Exception:  # a function of another kind
        return False


class _FusedRotary(torch.autograd.Function):
    """q, k: [B, H, S, D], of which k may have fewer heads; cos, sin: [B, S, D]. dtype: of the result."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        first, second = sin.chunk(2, dim=-1)
        return _turn(q, k, cos, (-1, first), (1, second), dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        of_q, of_k = grad_outputs
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        of_q, of_k = _turn(of_q, of_k, cos, (1, second), (-1, first), ctx.dtype)
        return of_q, of_k, None, None, None


def _turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    upper: tuple[int, Tensor],
    lower: tuple[int, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both times cos, plus, in the upper and lower half of D, the other half times a sign and a sine."""
    both_BSHD = torch.cat((q.transpose(1, 2), k.transpose(1, 2)), dim=2)
    turned_BSHD = both_BSHD * cos.unsqueeze(2)
    halves, turned = both_BSHD.chunk(2, dim=-1), turned_BSHD.chunk(2, dim=-1)
    for into, other, (sign, sine) in zip(turned, reversed(halves), (upper, lower), strict=True):
        into.addcmul_(other, sine.unsqueeze(2), value=sign)
    turned_BHSD = turned_BSHD.to(dtype).transpose(1, 2)
    return turned_BHSD[:, : q.shape[1]], turned_BHSD[:, q.shape[1] :]
