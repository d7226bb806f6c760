"""Linear layers under autocast in fewer kernels: those that share an input as one product, its gradients in float32.

Autocast casts the input and the weight of each layer for itself, and rounds the gradient of each weight to 16 bits to
cast it back. Here one cast and one product serve all layers of an input, and a product writes the gradient of their
weights in float32. Only weights that are trained in float32 are concerned; other layers run as they are.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fitune.model import attention as kernels

_16_BIT = (torch.float16, torch.bfloat16)
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Linear layers of one module that are all given the module's input."""


def fuse_linear_layers(model: nn.Module) -> None:
    """In place."""
    mlps: dict[type[nn.Module], Callable[..., Any] | None] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        if _has_linear(module, _ATTENTION):
            shared = _SharedInput([getattr(module, name) for name in _ATTENTION])
            for layer in shared.layers:
                layer.__dict__["shared_input"] = shared
            module.register_forward_hook(shared.forget, always_call=True)
        if not (_has_linear(module, _ATTENTION) or _has_linear(module, _MLP)):
            continue
        module.register_forward_pre_hook(_cast_input, with_kwargs=True)
        if type(module) not in mlps:
            mlps[type(module)] = _fused_mlp_of(module)
        forward = mlps[type(module)]
        if forward is not None:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _has_linear(module: nn.Module, names: Sequence[str]) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _dtype_of_products(hidden: Tensor, layers: Sequence[nn.Linear]) -> torch.dtype | None:
    """What autocast casts to; None where these layers run as they are: off a card, in float32, without autocast, or
    with weights that are not trained or not in float32."""
    kind = hidden.device.type
    if kernels.compute_capability(hidden) is None or not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    parameters = (each for layer in layers for each in (layer.weight, layer.bias) if each is not None)
    trained = all(each.requires_grad and each.dtype == torch.float32 for each in parameters)
    return dtype if trained and dtype in _16_BIT else None


def _linear(self: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., D] -> [..., F]."""
    shared: _SharedInput | None = self.__dict__.get("shared_input")
    dtype = _dtype_of_products(hidden, (self,) if shared is None else shared.layers)
    if dtype is None:
        return functional.linear(hidden, self.weight, self.bias)
    if shared is None:
        return _products((self,), hidden, dtype)[0]
    return shared.product_of(self, hidden, dtype)


class _SharedInput:
    """Query, key and value of one attention layer: the first that is called computes all three."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self._hidden: Tensor | None = None
        self._ready: list[Tensor | None] = []

    def product_of(self, layer: nn.Linear, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        number = next(number for number, each in enumerate(self.layers) if each is layer)
        if self._hidden is not hidden or self._ready[number] is None:
            *rotated, value = _products(self.layers, hidden, dtype)
            # query and key are turned into new tensors; attention keeps the value, and with it all of the product
            self._hidden, self._ready = hidden, [*rotated, value.contiguous()]
        product, self._ready[number] = cast(Tensor, self._ready[number]), None
        if not any(each is not None for each in self._ready):
            self.forget()
        return product

    def forget(self, *_: Any) -> None:
        """What a forward that failed has left."""
        self._hidden, self._ready = None, []


def _products(layers: Sequence[nn.Linear], hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What each layer makes of `hidden`: parts of one tensor."""
    joined = _joined_product(layers, hidden, dtype)
    return (joined,) if len(layers) == 1 else joined.split([layer.out_features for layer in layers], dim=-1)


def _joined_product(layers: Sequence[nn.Linear], hidden: Tensor, dtype: torch.dtype) -> Tensor:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) < len(layers):  # zeros in the place of those that are missing
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    parameters = [layer.weight for layer in layers] + biases
    product = _JoinedProduct.apply(hidden.to(dtype), len(layers), *parameters)  # type: ignore[no-untyped-call]
    return cast(Tensor, product)


class _JoinedProduct(torch.autograd.Function):
    """The product in 16 bits of one input with the weights, [F, D] in float32, of `num_layers` layers, after which
    their biases follow or none. The gradients of the weights are written in float32 at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, num_layers: int, *parameters: Tensor) -> Tensor:
        weight_FD = _joined(parameters[:num_layers], hidden.dtype)
        biases = parameters[num_layers:]
        ctx.save_for_backward(hidden, weight_FD)
        ctx.widths = [weight.shape[0] for weight in parameters[:num_layers]]
        ctx.has_bias = len(biases) > 0
        return functional.linear(hidden, weight_FD, _joined(biases, hidden.dtype) if biases else None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_FD = ctx.saved_tensors
        grad_TF, hidden_TD = (each.reshape(-1, each.shape[-1]) for each in (*grad_outputs, hidden))
        of_hidden = (grad_TF @ weight_FD).view(hidden.shape) if ctx.needs_input_grad[0] else None
        of_weights = _float32_product(grad_TF.T, hidden_TD).split(ctx.widths)
        of_biases = grad_TF.sum(0, dtype=torch.float32).split(ctx.widths) if ctx.has_bias else ()
        return of_hidden, None, *of_weights, *of_biases


def _joined(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One after another along their first dimension, cast."""
    if len(parameters) == 1:
        return parameters[0].to(dtype)
    if torch.compiler.is_compiling():
        return torch.cat(list(parameters)).to(dtype)
    widths = [parameter.shape[0] for parameter in parameters]
    joined = parameters[0].new_empty((sum(widths), *parameters[0].shape[1:]), dtype=dtype)
    torch._foreach_copy_(list(joined.split(widths)), list(parameters))
    return joined


def _float32_product(first: Tensor, second: Tensor) -> Tensor:
    """Of two matrices in 16 bits. CPUs have no such product."""
    return torch.mm(first, second, out_dtype=torch.float32)


def _cast_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Under autocast each linear layer would cast the module's input for itself, and each cast its gradient back."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or kernels.compute_capability(hidden) is None:
        return args, kwargs
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return args, kwargs
    hidden = hidden.to(torch.get_autocast_dtype(kind))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


# ---- gated MLPs ------------------------------------------------------------------------------------------------------


def _fused_mlp_of(module: nn.Module) -> Callable[..., Any] | None:
    """A forward with one product for gate and up; None where the module's own is not seen, on random numbers, to be
    down(silu(gate) * up)."""
    if {*module._modules} != {*_MLP, "down_proj", "act_fn"} or not _has_linear(module, (*_MLP, "down_proj")):
        return None
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    generator = torch.Generator("cpu").manual_seed(0)
    layers = {name: nn.Linear(8, 8, bias=False, device="cpu") for name in (*_MLP, "down_proj")}
    for layer in layers.values():
        layer.weight.data.normal_(generator=generator)
    probe._modules = {**layers, "act_fn": module._modules["act_fn"]}
    hidden = torch.randn((4, 8), generator=generator, device="cpu")
    with torch.no_grad():
        gate, up = (layers[name](hidden) for name in _MLP)
        expected = layers["down_proj"](functional.silu(gate) * up)
        try:
            if not torch.allclose(type(module).forward(probe, hidden), expected, rtol=1e-5, atol=1e-6):
                return None
        except Exception:  # an MLP of another kind
            return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        layers = self.gate_proj, self.up_proj
        dtype = _dtype_of_products(hidden, layers)
        if dtype is None:
            return cast(Tensor, type(self).forward(self, hidden))
        joined = _joined_product(layers, hidden, dtype)
        if torch.compiler.is_compiling():
            gate, up = joined.chunk(2, dim=-1)
            return cast(Tensor, self.down_proj(functional.silu(gate) * up))
        return cast(Tensor, self.down_proj(_GatedSilu.apply(joined)))  # type: ignore[no-untyped-call]

    return forward


class _GatedSilu(torch.autograd.Function):
    """[..., 2 F], of which the first half is the gate -> [..., F]. The activated gate is computed again in the backward
    instead of being kept, and both gradients are written into one tensor."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (grad,) = grad_outputs
        (joined,) = ctx.saved_tensors
        gate, up = joined.chunk(2, dim=-1)
        gradients = torch.empty_like(joined)
        of_gate, of_up = gradients.chunk(2, dim=-1)
        torch.mul(grad, functional.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return gradients
