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
ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def fuse_linear_layers(model: nn.Module) -> None:
    """Replace the forwards of linear layers and gated MLPs, in place."""
    mlps: dict[type[nn.Module], Callable[..., object] | None] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        if has_linear(module, ATTENTION):
            _share_input(module)
        if has_linear(module, _MLP):
            if type(module) not in mlps:
                mlps[type(module)] = _fused_mlp_of(module)
            forward = mlps[type(module)]
            if forward is not None:
                module.__dict__["joined"] = Joined([getattr(module, name) for name in _MLP])
                module.__dict__["casts_input"] = True
                module.forward = MethodType(forward, module)
    for module in model.modules():
        if type(module) is nn.Linear and "joined" not in module.__dict__:
            module.__dict__["joined"] = Joined([module])
    _cast_weights_by_layer(model)


def cast_inputs(model: nn.Module) -> None:
    """Cast the input of each module whose linear layers share it, if its forward does not."""
    for module in model.modules():
        shares_input = has_linear(module, ATTENTION) or has_linear(module, _MLP)
        if shares_input and "casts_input" not in module.__dict__:
            module.register_forward_pre_hook(cast_input, with_kwargs=True)


def _share_input(attention: nn.Module) -> None:
    shared = _SharedInput([getattr(attention, name) for name in ATTENTION])
    for layer in shared.joined.layers:
        layer.__dict__["shared_input"], layer.__dict__["joined"] = shared, shared.joined


def has_linear(module: nn.Module, names: Sequence[str]) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


class Joined:
    """Linear layers with the same input, whose weights are joined for one matrix product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.widths = [layer.out_features for layer in layers]
        #: the joined weights in 16 bits, if they were cast before the layer runs
        self.cast: Tensor | None = None

    def dtype_on(self, device: Tensor) -> torch.dtype | None:
        """Return the dtype that autocast casts to on the tensor's device.

        Returns None if these layers run unchanged: off a GPU, without autocast to 16 bits, or with
        weights that are not trained or not float32.
        """
        kind = device.device.type
        if kernels.compute_capability(device) is None or not torch.is_autocast_enabled(kind):
            return None
        for layer in self.layers:
            # Module.__getattr__ takes longer than all of this loop.
            for each in layer._parameters.values():
                if each is not None and not (each.requires_grad and each.dtype == torch.float32):
                    return None
        dtype = torch.get_autocast_dtype(kind)
        return dtype if dtype in _16_BIT else None

    def product(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the product with the joined weights, [..., D] -> [..., F].

        F is that of all layers in order.
        """
        args = hidden, self, dtype, *self.parameters()
        return cast(Tensor, _JoinedProduct.apply(*args))  # type: ignore[no-untyped-call]

    def weights(self) -> list[Tensor]:
        # Module.__getattr__, which `layer.weight` calls, takes longer than all else here.
        return [cast(Tensor, layer._parameters["weight"]) for layer in self.layers]

    def parameters(self) -> list[Tensor]:
        """Return the weights, and after them as many biases or none."""
        weights, biases = self.weights(), [layer._parameters["bias"] for layer in self.layers]
        if all(bias is None for bias in biases):
            return weights
        # Zeros for the layers without a bias.
        return weights + [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]


def _linear(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Compute the forward of a linear layer: [..., D] -> [..., F]."""
    joined: Joined = self.__dict__["joined"]
    dtype = joined.dtype_on(hidden)
    if dtype is None:
        return functional.linear(hidden, self.weight, self.bias)
    shared: _SharedInput | None = self.__dict__.get("shared_input")
    if shared is not None:
        return shared.product_of(self, hidden, dtype)
    return (joined if joined.layers[0] is self else Joined([self])).product(hidden, dtype)


class _SharedInput:
    """Query, key and value of an attention layer; the first one called computes all three."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.joined = Joined(layers)
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

    def forget(*_: object) -> None:
        for each in casts:
            each.forget()

    body = next((each for each in model.modules() if _holds(each, layers[0])), model)
    body.register_forward_pre_hook(lambda *_: _cast_weights(casts))
    body.register_forward_hook(forget, always_call=True)


def _cast_weights(casts: Sequence[_WeightCast]) -> None:
    needed = [each for each in casts if each.is_needed()] if torch.is_grad_enabled() else ()
    into: list[Tensor] = []
    weights: list[Tensor] = []
    for joined in (joined for each in needed for joined in each.joined):
        own = joined.weights()
        dtype = None if isinstance(own[0], DTensor) else joined.dtype_on(own[0])
        if dtype is not None:
            joined.cast = own[0].new_empty((sum(joined.widths), own[0].shape[1]), dtype=dtype)
            into += joined.cast.split_with_sizes(joined.widths)
            weights += own
    if weights:
        with torch.no_grad():
            torch._foreach_copy_(into, weights)


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    """Return whether the module has the layer in one of its lists of layers."""
    lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
    return any(child is layer for each in lists for child in each)


def _joined_of(layer: nn.Module) -> Iterator["Joined"]:
    seen = set()
    for module in layer.modules():
        joined = module.__dict__.get("joined")
        if joined is not None and id(joined) not in seen:
            seen.add(id(joined))
            yield joined


class _JoinedProduct(torch.autograd.Function):
    """Multiplies one input with the joined weights of several layers, in 16 bits.

    The gradients of the weights are written in float32. The arguments of `forward` are:

    hidden: [..., D].
    joined: the layers.
    dtype: of the product.
    parameters: those of the layers, float32; weights are [F, D].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, joined: Joined, dtype: torch.dtype, *parameters: Tensor
    ) -> Tensor:
        hidden, weight_FD, bias_F = joined_inputs(ctx, hidden, joined, dtype, parameters)
        ctx.save_for_backward(hidden, weight_FD)
        return functional.linear(hidden, weight_FD, bias_F)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_parameters = input_gradients(ctx, *grad_outputs, *ctx.saved_tensors)
        return of_hidden, None, None, *of_parameters


def joined_inputs(
    ctx: Any,
    hidden: Tensor,
    joined: Joined,
    dtype: torch.dtype,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the input, the joined weights and the joined biases in 16 bits.

    ctx: of an autograd function, which notes what `input_gradients` needs.
    """
    ctx.widths, ctx.dtype = joined.widths, hidden.dtype
    weights, biases = parameters[: len(ctx.widths)], parameters[len(ctx.widths) :]
    ctx.has_bias = len(biases) > 0
    weight_FD = _join(weights, dtype) if joined.cast is None else joined.cast
    return hidden.to(dtype), weight_FD, _join(biases, dtype) if biases else None


def input_gradients(
    ctx: Any, grad: Tensor, hidden: Tensor, weight_FD: Tensor
) -> Iterator[Tensor | None]:
    """Yield the gradients of the input and of each layer's parameters.

    grad: [..., F], of the product.
    hidden, weight_FD: as `joined_inputs` returned them.
    """
    grad_TF, hidden_TD = grad.reshape(-1, grad.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    yield (
        (grad_TF @ weight_FD).view(hidden.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    )
    yield from _float32_product(grad_TF.T, hidden_TD).split_with_sizes(ctx.widths)
    if ctx.has_bias:
        yield from grad_TF.sum(0, dtype=torch.float32).split_with_sizes(ctx.widths)


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


def cast_input(
    _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[Any, ...], dict[str, object]]:
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


def _fused_mlp_of(module: nn.Module) -> Callable[..., object] | None:
    """Return a forward with one matrix product for gate and up, None if it does not fit.

    On random numbers the module's own forward must compute down(silu(gate) * up).
    """
    if {*module._modules} != {*_MLP, "down_proj", "act_fn"} or not has_linear(
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
        layers: Joined = self.__dict__["joined"]
        dtype = layers.dtype_on(hidden)
        if dtype is None:
            (hidden,), _ = cast_input(self, (hidden,), {})
            return cast(Tensor, type(self).forward(self, hidden))
        joined = layers.product(hidden.to(dtype), dtype)
        if torch.compiler.is_compiling():
            gate, up = joined.chunk(2, dim=-1)
            return cast(Tensor, self.down_proj(functional.silu(gate) * up))
        return cast(Tensor, self.down_proj(_GatedSilu.apply(joined)))  # type: ignore[no-untyped-call]

    return forward


class _GatedSilu(torch.autograd.Function):
    """Computes silu(gate) * up from [..., 2 F], whose first half is the gate; returns [..., F].

    The activated gate is recomputed in the backward instead of being saved, and both gradients are
    written into one tensor. It is no part of the product before it, whose backward would then find
    what is saved here still allocated.
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
