"""Compute the same arithmetic as a model's own layers in fewer kernels.

A small model on a fast GPU waits for kernel launches. Each part is replaced only if the model's own
code was observed to compute the same. On a CPU, where a launch costs little, the model's own code
runs.
"""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fitune.model import packed_attention as kernels
from fitune.model.fused_attention import fuse_attention
from fitune.model.fused_linear import cast_inputs, fuse_linear_layers
from fitune.model.rotary import angles_of, random_tensors, rotate_back, rotate_heads


def fuse_layers(model: nn.Module) -> None:
    """Replace parts of a model by fused kernels, in place.

    RMS norms become torch's fused kernel, rotary embeddings one kernel for query and key together,
    and linear layers and attention are replaced as `fused_linear` and `fused_attention` describe.
    """
    forwards: dict[object, Callable[..., object] | None] = {}
    for module in model.modules():
        eps = _eps_of_rms_norm(module)
        key = type(module), eps
        if key not in forwards:
            # A `torch.device("meta")` mode would also put the random numbers on that device.
            with torch._C.DisableTorchFunction():
                forwards[key] = (
                    _with_fused_rotary(type(module)) if eps is None else _fused_norm_of(module, eps)
                )
        forward = forwards[key]
        if forward is not None:
            module.forward = MethodType(forward, module)
    with torch._C.DisableTorchFunction():
        fuse_linear_layers(model)
        fuse_attention(model)
        cast_inputs(model)


# ---- RMS norms -----------------------------------------------------------------------------------


def _eps_of_rms_norm(module: nn.Module) -> float | None:
    """Return the epsilon of an RMS norm with one weight; None for any other module."""
    if "RMSNorm" not in type(module).__name__ or isinstance(module, nn.RMSNorm):
        return None
    if [*module._parameters] != ["weight"] or module._buffers or module._modules:
        return None
    # A second parameter would be an optional gate.
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _fused_norm_of(module: nn.Module, eps: float) -> Callable[..., object] | None:
    """Return a forward with torch's kernel.

    Returns None if the module's own forward computes something else on random numbers.
    """
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    hidden, weight = random_tensors((4, 16), (16,))
    # So small that an epsilon added elsewhere in the formula changes the result.
    hidden *= 0.01
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        own = type(module).forward(probe, hidden)
    # A norm of another kind may raise anything.
    except Exception:
        return None
    if not torch.allclose(
        own, functional.rms_norm(hidden, (16,), weight, eps), rtol=1e-5, atol=1e-6
    ):
        return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        weight = self.weight
        if hidden.dtype != weight.dtype or kernels.compute_capability(hidden) is None:
            return cast(Tensor, type(self).forward(self, hidden))
        if hidden.dtype == torch.float32:
            return functional.rms_norm(hidden, weight.shape, weight, eps)
        # Under autocast the kernel would return float32 for 16 bits.
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.rms_norm(hidden, weight.shape, weight, eps)

    return forward


# ---- rotary embeddings ---------------------------------------------------------------------------

#: the function that transformers' attention layers call: (q, k, cos, sin) -> (q, k)
_ROTARY = "apply_rotary_pos_emb"


def _with_fused_rotary(layer: type[nn.Module]) -> Callable[..., object] | None:
    """Return the layer's own forward, which calls `_FusedRotary` in place of that function.

    Returns None if the layer's function computes something else.
    """
    forward = layer.forward
    own: Any = getattr(forward, "__globals__", {}).get(_ROTARY)
    if (
        not isinstance(forward, FunctionType)
        or _ROTARY not in forward.__code__.co_names
        or not _is_plain_rotary(own)
    ):
        return None

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: object
    ) -> object:
        if rest or options or not _is_whole(q, k, cos) or kernels.compute_capability(q) is None:
            return own(q, k, cos, sin, *rest, **options)
        # Under autocast attention would cast the result, so it is computed in that dtype.
        kind = q.device.type
        dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else torch.result_type(q, cos)
        )
        # The compiler fuses it by itself; slices of one tensor would leave it with copies.
        if torch.compiler.is_compiling():
            return tuple(each.to(dtype) for each in own(q, k, cos, sin))
        return _FusedRotary.apply(q, k, cos, sin, dtype)  # type: ignore[no-untyped-call]

    known = forward.__globals__ | {_ROTARY: rotary}
    fused = FunctionType(
        forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _is_whole(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Return whether all numbers of each head are rotated; some models rotate only the first."""
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[2:] == k.shape[2:]
        and cos.shape[1:] == q.shape[2:]
    )


def _is_plain_rotary(own: Any) -> bool:
    """Return whether the function rotates the halves of each head, tested on random numbers."""
    q, k, cos, sin = random_tensors((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
    rotated = rotate_heads(_heads(q, k), angles_of(cos, sin), torch.float32).transpose(1, 2)
    try:
        return all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(own(q, k, cos, sin), rotated.split((4, 2), dim=1), strict=True)
        )
    # A function of another kind may raise anything.
    except Exception:
        return False


class _FusedRotary(torch.autograd.Function):
    """Rotates query and key in one kernel.

    q, k: [B, H, S, D], where k may have fewer heads.
    cos, sin: [B, S, D].
    dtype: that of the result.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.num_queries = q.dtype, q.shape[1]
        rotated = rotate_heads(_heads(q, k), angles_of(cos, sin), dtype).transpose(1, 2)
        return rotated[:, : ctx.num_queries], rotated[:, ctx.num_queries :]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        angles = angles_of(*ctx.saved_tensors)
        found = rotate_back(_heads(*grad_outputs), angles).to(ctx.dtype).transpose(1, 2)
        return found[:, : ctx.num_queries], found[:, ctx.num_queries :], None, None, None


def _heads(q: Tensor, k: Tensor) -> Tensor:
    """Return query and key, [B, H, S, D] each, as heads of one tensor [B, S, H, D]."""
    return torch.cat((q.transpose(1, 2), k.transpose(1, 2)), dim=2)
