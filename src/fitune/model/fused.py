"""The same arithmetic as in a model's own layers, in fewer kernels: a small model on a fast card waits for launches.

Each part is replaced only where the model's own code was seen to compute the same. On a CPU, where a launch costs
little, the model's own code runs.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fitune.model import attention

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one module that are all given the module's input."""


def fuse_layers(model: nn.Module) -> None:
    """Replaces, in place: RMS norms by torch's fused kernel, and the casts of one tensor that autocast makes for each
    of several linear layers by a single cast."""
    same: dict[tuple[type, float], bool] = {}
    for module in model.modules():
        eps = _eps_of_rms_norm(module)
        if eps is not None:
            key = type(module), eps
            if key not in same:
                with (
                    torch._C.DisableTorchFunction()
                ):  # a model that is built on the meta device is asked on the CPU too
                    same[key] = _is_plain_rms_norm(module, eps)
            if same[key]:
                module.forward = MethodType(_fused_rms_norm, module)
        if any(all(type(getattr(module, name, None)) is nn.Linear for name in names) for names in _SHARED_INPUT):
            module.register_forward_pre_hook(_cast_input, with_kwargs=True)


def _eps_of_rms_norm(module: nn.Module) -> float | None:
    """None for a module that is no RMS norm with one weight."""
    if "RMSNorm" not in type(module).__name__ or isinstance(module, nn.RMSNorm):
        return None
    if [*module._parameters] != ["weight"] or module._buffers or module._modules:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _is_plain_rms_norm(module: nn.Module, eps: float) -> bool:
    """Whether the module's own forward computes what torch's does, seen on random numbers."""
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    generator = torch.Generator("cpu").manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator, device="cpu") for size in ((4, 16), (16,)))
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        own = type(module).forward(probe, hidden * 0.01)  # small enough for another place of epsilon to show
    except Exception:  # a norm of another kind
        return False
    return bool(torch.allclose(own, functional.rms_norm(hidden * 0.01, (16,), weight, eps), rtol=1e-5, atol=1e-6))


def _fused_rms_norm(self: Any, hidden: Tensor) -> Tensor:
    """[..., D] -> [..., D]."""
    weight = self.weight
    if hidden.dtype != weight.dtype or attention.compute_capability(hidden) is None:
        own: Tensor = type(self).forward(self, hidden)
        return own
    with torch.autocast(hidden.device.type, enabled=False):  # which would return float32 for 16 bits
        return functional.rms_norm(hidden, weight.shape, weight, _eps_of_rms_norm(self))


def _cast_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Under autocast each linear layer would cast the module's input for itself, and each cast its gradient back."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or attention.compute_capability(hidden) is None:
        return args, kwargs
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return args, kwargs
    hidden = hidden.to(torch.get_autocast_dtype(kind))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
