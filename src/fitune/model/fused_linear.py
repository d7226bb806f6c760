"""Compute linear layers under autocast in fewer kernels, with their weight gradients in float32.

Autocast casts the input and the weight of each layer separately, and rounds the gradient of each
weight to 16 bits before casting it back. Here layers with the same input share one cast and one
matrix product, and the product for the weight gradients writes float32. This applies only to
weights that are trained in float32; other layers run unchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from fitune.model import packed_attention as kernels
from fitune.model.recompute import recomputable_layers

_16_BIT = (torch.float16, torch.bfloat16)
#: Linear layers of one module that all take the module's input.
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def fuse_linear_layers(model: nn.Module) -> None:
    """Replace the forwards of linear layers and gated MLPs, in place."""
    mlps: dict[type[nn.Module], Callable[..., Any] | None] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        is_attention, is_mlp = _has_linear(module, _ATTENTION), _has_linear(module, _MLP)
        if is_attention:
            _share_input(module)
        if is_attention or is_mlp:
            module.register_forward_pre_hook(_cast_input, with_kwargs=True)
        if is_mlp:
            if type(module) not in mlps:
                mlps[type(module)] = _fused_mlp_of(module)
            forward = mlps[type(module)]
            if forward is not None:
                module.__dict__["joined"] = _Joined([getattr(module, name) for name in _MLP])
                module.forward = MethodType(forward, module)
    for module in model.modules():
        if type(module) is nn.Linear and "joined" not in module.__dict__:
            module.__dict__["joined"] = _Joined([module])
    _cast_weights_by_layer(model)


def _share_input(attention: nn.Module) -> None:
    shared = _SharedInput([getattr(attention, name) for name in _ATTENTION])
    for layer in shared.joined.layers:
        layer.__dict__["shared_input"], layer.__dict__["joined"] = shared, shared.joined


def _has_linear(module: nn.Module, names: Sequence[str]) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


class _Joined:
    """Linear layers with the same input, whose weights are joined for one matrix product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        #: the joined weights in 16 bits, if they were cast before the layer runs
        self.cast: Tensor | None = None

    @property
    def widths(self) -> list[int]:
        return [layer.out_features for layer in self.layers]

    def dtype_on(self, device: Tensor) -> torch.dtype | None:
        """Return the dtype that autocast casts to on the tensor's device.

        Returns None if these layers run unchanged: off a GPU, without autocast to 16 bits, or with
        weights that are not trained or not float32.
        """
        kind = device.device.type
        if kernels.compute_capability(device) is None or not torch.is_autocast_enabled(kind):
            return None
        dtype = torch.get_autocast_dtype(kind)
        parameters = (
            each for layer in self.layers for each in (layer.weight, layer.bias) if each is not None
        )
        trained = all(each.requires_grad and each.dtype == torch.float32 for each in parameters)
        return dtype if trained and dtype in _16_BIT else None

    def product(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the product with the joined weights, [..., D] -> [..., F].

        F is that of all layers in order.
        """
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        # Zeros for the layers without a bias.
        if biases and len(biases) < len(self.layers):
            biases = [
                layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
                for layer in self.layers
            ]
        parameters = [layer.weight for layer in self.layers] + biases
        args = hidden.to(dtype), self.cast, len(self.layers), *parameters
        return cast(Tensor, _JoinedProduct.apply(*args))  # type: ignore[no-untyped-call]


def _linear(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Compute the forward of a linear layer: [..., D] -> [..., F]."""
    joined: _Joined = self.__dict__["joined"]
    dtype = joined.dtype_on(hidden)
    if dtype is None:
        return functional.linear(hidden, self.weight, self.bias)
    shared: _SharedInput | None = self.__dict__.get("shared_input")
    if shared is not None:
        return shared.product_of(self, hidden, dtype)
    return (joined if joined.layers[0] is self else _Joined([self])).product(hidden, dtype)


class _SharedInput:
    """Query, key and value of an attention layer; the first one called computes all three."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.joined = _Joined(layers)
        self._hidden: Tensor | None = None
        self._ready: list[Tensor | None] = []

    def product_of(self, layer: nn.Linear, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        number = next(number for number, each in enumerate(self.joined.layers) if each is layer)
        if self._hidden is not hidden or self._ready[number] is None:
            *query_and_key, value = self.joined.product(hidden, dtype).split(
                self.joined.widths, dim=-1
            )
            # Rotary embeddings copy query and key. Attention saves the value for the backward;
            # as a view it would keep the whole product allocated.
            self._hidden, self._ready = hidden, [*query_and_key, value.contiguous()]
        product, self._ready[number] = cast(Tensor, self._ready[number]), None
        if not any(each is not None for each in self._ready):
            self.forget()
        return product

    def forget(self) -> None:
        self._hidden, self._ready = None, []


class _WeightCast:
    """Casts the weights of one layer before it runs, and drops what its forward leaves in it."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.joined = list(_joined_of(layer))
        self._shared = [
            shared
            for module in layer.modules()
            if (shared := module.__dict__.get("shared_input")) is not None
        ]
        self._hooks = (
            layer.register_forward_pre_hook(lambda *_: _cast_weights([self])),
            layer.register_forward_hook(lambda *_: self.forget(), always_call=True),
        )

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def is_needed(self) -> bool:
        """Return whether the layer keeps its weights in 16 bits until the backward.

        A layer that is recomputed does not, and casts each weight where it is used.
        """
        return not (self._layer.training and getattr(self._layer, "gradient_checkpointing", False))

    def forget(self) -> None:
        """Drop the weights and shared products; autograd holds what the backward needs."""
        for joined in self.joined:
            joined.cast = None
        for shared in self._shared:
            shared.forget()


def _cast_weights_by_layer(model: nn.Module) -> None:
    """Cast the weights of each layer in one launch before it runs."""
    for layer in recomputable_layers(model):
        layer.__dict__["weight_cast"] = _WeightCast(layer)


def cast_weights_before_all_layers(model: nn.Module) -> None:
    """Cast the weights of all layers in one launch, before the first layer runs.

    For compiled layers, into whose graphs the hooks of a layer would be traced.
    """
    layers = recomputable_layers(model)
    casts = [each for layer in layers if (each := layer.__dict__.get("weight_cast")) is not None]
    for each in casts:
        each.remove_hooks()

    def forget(*_: Any) -> None:
        for each in casts:
            each.forget()

    body = next((each for each in model.modules() if _holds(each, layers[0])), model)
    body.register_forward_pre_hook(lambda *_: _cast_weights(casts))
    body.register_forward_hook(forget, always_call=True)


def _cast_weights(casts: Sequence[_WeightCast]) -> None:
    if not torch.is_grad_enabled():
        return
    into: list[Tensor] = []
    weights: list[Tensor] = []
    for joined in (joined for each in casts if each.is_needed() for joined in each.joined):
        first = joined.layers[0].weight
        dtype = None if isinstance(first, DTensor) else joined.dtype_on(first)
        if dtype is not None:
            joined.cast = first.new_empty((sum(joined.widths), first.shape[1]), dtype=dtype)
            into += joined.cast.split(joined.widths)
            weights += [layer.weight for layer in joined.layers]
    if weights:
        with torch.no_grad():
            torch._foreach_copy_(into, weights)


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    """Return whether the module has the layer in one of its lists of layers."""
    lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
    return any(child is layer for each in lists for child in each)


def _joined_of(layer: nn.Module) -> Iterator["_Joined"]:
    seen = set()
    for module in layer.modules():
        joined = module.__dict__.get("joined")
        if joined is not None and id(joined) not in seen:
            seen.add(id(joined))
            yield joined


class _JoinedProduct(torch.autograd.Function):
    """Multiplies one input in 16 bits with the joined weights of several layers.

    The gradients of the weights are written in float32. The arguments of `forward` are:

    hidden: [..., D] in 16 bits.
    cast_FD: the joined weights in 16 bits, if they exist already.
    num_layers: the number of weights in `parameters`.
    parameters: the weights, [F, D] in float32 each, then as many biases or none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, cast_FD: Tensor | None, num_layers: int, *parameters: Tensor
    ) -> Tensor:
        weights, biases = parameters[:num_layers], parameters[num_layers:]
        weight_FD = _join(weights, hidden.dtype) if cast_FD is None else cast_FD
        ctx.save_for_backward(hidden, weight_FD)
        ctx.widths = [weight.shape[0] for weight in weights]
        ctx.has_bias = len(biases) > 0
        return functional.linear(hidden, weight_FD, _join(biases, hidden.dtype) if biases else None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_FD = ctx.saved_tensors
        grad_TF, hidden_TD = (each.reshape(-1, each.shape[-1]) for each in (*grad_outputs, hidden))
        of_hidden = (grad_TF @ weight_FD).view(hidden.shape) if ctx.needs_input_grad[0] else None
        of_weights = _float32_product(grad_TF.T, hidden_TD).split(ctx.widths)
        of_biases = grad_TF.sum(0, dtype=torch.float32).split(ctx.widths) if ctx.has_bias else ()
        return of_hidden, None, None, *of_weights, *of_biases


def _join(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the parameters joined along their first dimension and cast."""
    if len(parameters) == 1:
        return parameters[0].to(dtype)
    if torch.compiler.is_compiling():
        return torch.cat(list(parameters)).to(dtype)
    widths = [parameter.shape[0] for parameter in parameters]
    joined = parameters[0].new_empty((sum(widths), *parameters[0].shape[1:]), dtype=dtype)
    torch._foreach_copy_(list(joined.split(widths)), list(parameters))
    return joined


def _float32_product(first: Tensor, second: Tensor) -> Tensor:
    """Return the float32 product of two matrices in 16 bits; CPUs have no such kernel."""
    return torch.mm(first, second, out_dtype=torch.float32)


def _cast_input(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cast the input of a module under autocast, as a forward pre-hook.

    Otherwise each linear layer would cast it separately, and each cast would cast its gradient
    back.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or kernels.compute_capability(hidden) is None:
        return args, kwargs
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return args, kwargs
    hidden = hidden.to(torch.get_autocast_dtype(kind))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


# ---- gated MLPs ----------------------------------------------------------------------------------


def _fused_mlp_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return a forward with one matrix product for gate and up, None if it does not fit.

    On random numbers the module's own forward must compute down(silu(gate) * up).
    """
    if {*module._modules} != {*_MLP, "down_proj", "act_fn"} or not _has_linear(
        module, (*_MLP, "down_proj")
    ):
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
            if not torch.allclose(
                type(module).forward(probe, hidden), expected, rtol=1e-5, atol=1e-6
            ):
                return None
        # An MLP of another kind may raise anything.
        except Exception:
            return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        layers: _Joined = self.__dict__["joined"]
        dtype = layers.dtype_on(hidden)
        if dtype is None:
            return cast(Tensor, type(self).forward(self, hidden))
        joined = layers.product(hidden, dtype)
        if torch.compiler.is_compiling():
            gate, up = joined.chunk(2, dim=-1)
            return cast(Tensor, self.down_proj(functional.silu(gate) * up))
        gated = _GatedSilu.apply(joined)  # type: ignore[no-untyped-call]
        return cast(Tensor, self.down_proj(gated))

    return forward


class _GatedSilu(torch.autograd.Function):
    """Computes silu(gate) * up from [..., 2 F], whose first half is the gate; returns [..., F].

    The activated gate is recomputed in the backward instead of being saved, and both gradients are
    written into one tensor.
    """

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
