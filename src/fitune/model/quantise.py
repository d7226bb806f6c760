"""Store frozen weights of linear layers and experts in 4 bits: NF4 with double quantisation.

This is the format of QLoRA (Dettmers et al. 2023, arXiv 2305.14314). bitsandbytes has the kernels,
for GPUs and CPUs.

A weight of n elements takes n / 2 bytes, one byte of scale for each 64 elements, a float32 for each
256 of these scales, a code table of 64 bytes and an offset: the layout of bitsandbytes
(functional.py: quantize_4bit with compress_statistics). For a matrix product the whole weight is
unpacked into the dtype of the product, in the forward and again in the backward
(autograd/_functions.py: MatMul4Bit), and then freed. For tensors without data the same sizes are
allocated by arithmetic, so a step can be recorded without bitsandbytes.
"""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional
from transformers import PreTrainedModel

from fitune.errors import ModelError, UsageError
from fitune.model.experts import EXPERTS, STACKED

#: elements that share a scale
BLOCK = 64
#: scales that share a scale of their own
SCALE_BLOCK = 256
_NUM_CODES, _NUM_SCALE_CODES = 16, 256
#: bitsandbytes counts the elements of a tensor in 32 bits.
_MOST_ELEMENTS = 2**31
#: a share of the parameters below which `not_quantised` does not mention them
_LEAST_SHARE = 0.05
NOT_QUANTISED = (
    "qlora packs linear layers, and experts that transformers computes through its registry"
)


class NF4Linear(nn.Linear):
    """A linear layer with a frozen 4-bit weight: uint8 [n / 2, 1], two elements in a byte.

    On the meta device it has the same tensors without data. The bias is not quantised.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias = linear.bias
        _pack(self, linear.weight)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return cast(Tensor, _Product.apply(input, self))  # type: ignore[no-untyped-call]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight, [out_features, in_features] of that dtype."""
        return _unpacked(self, (self.out_features, self.in_features), dtype)


class NF4Experts(nn.Module):
    """The frozen weights of all experts of a layer in 4 bits, in the same format as `NF4Linear`.

    transformers has them in one tensor of three dimensions. This module replaces the tensor, under
    its name, in the experts module.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        _pack(self, weight)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return _unpacked(self, tuple(self.shape), dtype)


def _pack(module: nn.Module, weight: Tensor) -> None:
    """Give `module` the packed weight as a parameter and its scales as buffers."""
    size = weight.numel()
    num_blocks = -(-size // BLOCK)
    if weight.device.type == "meta":
        packed = torch.empty((-(-size // 2), 1), dtype=torch.uint8, device="meta")
        scales = torch.empty(num_blocks, dtype=torch.uint8, device="meta")
        outer = torch.empty(-(-num_blocks // SCALE_BLOCK), dtype=torch.float32, device="meta")
        offset = torch.empty((), dtype=torch.float32, device="meta")
        codes = torch.empty(_NUM_CODES, dtype=torch.float32, device="meta")
        scale_codes = torch.empty(_NUM_SCALE_CODES, dtype=torch.float32, device="meta")
    else:
        packed, state = _kernels().quantize_4bit(
            weight.detach(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        scales, outer, offset = state.absmax, state.state2.absmax, state.offset
        codes, scale_codes = state.code, state.state2.code
    module.weight = nn.Parameter(packed, requires_grad=False)
    for name, buffer in (
        ("scales", scales), ("outer_scales", outer), ("offset", offset), ("codes", codes),
        ("scale_codes", scale_codes),
    ):  # fmt: skip
        module.register_buffer(name, buffer)


def _unpacked(packed: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the whole unpacked weight."""
    if packed.weight.is_meta or is_fake(packed.weight):
        # dequantize_4bit of functional.py first makes the scales float32.
        scales = torch.empty(packed.scales.shape, dtype=torch.float32, device=packed.weight.device)
        weight = torch.empty(shape, dtype=dtype, device=packed.weight.device)
        del scales
        return weight
    kernels = _kernels()
    outer = kernels.QuantState(
        packed.outer_scales, code=packed.scale_codes, blocksize=SCALE_BLOCK, dtype=torch.float32
    )
    state = kernels.QuantState(
        packed.scales, shape=torch.Size(shape), code=packed.codes, blocksize=BLOCK,
        quant_type="nf4", dtype=dtype, offset=packed.offset, state2=outer,
    )  # fmt: skip
    return cast(Tensor, kernels.dequantize_4bit(packed.weight, state))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return functional.linear(input, layer.unpacked(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grad_outputs
        return grad @ ctx.layer.unpacked(grad.dtype) if ctx.needs_input_grad[0] else None, None


def quantise(model: PreTrainedModel) -> PreTrainedModel:
    """Quantise the linear layers of a model except its head, and its experts, in place.

    Experts are quantised if fitune computes them. One layer is quantised after the other. Raises
    ModelError if bitsandbytes is missing or the model has no linear layers.
    """
    head = model.get_output_embeddings()
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child is not head
    ]
    if not found:
        raise ModelError(
            "model.method=qlora needs linear layers, and this model has none: use lora"
        )
    for parent, name, child in found:
        setattr(parent, name, NF4Linear(child))
    for experts in list(model.modules()):
        for name in _packable(experts):
            weight = getattr(experts, name)
            delattr(experts, name)
            setattr(experts, name, NF4Experts(weight))
    return model


def _packable(module: nn.Module) -> list[str]:
    """Return the names of an experts module's weights that `grouped_experts` reads.

    For any other module there are none.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) != EXPERTS or not hasattr(
        module, "_is_expert_parallel"
    ):
        return []
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if name in STACKED and parameter.dim() == 3 and parameter.numel() < _MOST_ELEMENTS
    ]


def not_quantised(model: nn.Module) -> str | None:
    """Return which weights of a quantised model's layers are not quantised, as one clause.

    Returns None if they are few. Some architectures compute their experts with code of their own,
    which needs ordinary weights.
    """
    bare = [
        (f"{name.rpartition('.')[2] or type(module).__name__}.{key}", parameter)
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
        and parameter.dtype != torch.uint8
        and not isinstance(module, nn.Linear | nn.Embedding)
        and not key.startswith("lora_")
    ]
    share = sum(parameter.numel() for _, parameter in bare) / sum(
        map(num_weights, model.parameters())
    )
    if share < _LEAST_SHARE:
        return None
    names = ", ".join(sorted({name for name, _ in bare}))
    dtype = str(bare[0][1].dtype).removeprefix("torch.")
    return f"{names} hold {share:.0%} of the parameters and stay in {dtype}: {NOT_QUANTISED}"


def share_tables(model: nn.Module) -> None:
    """Make all layers read the code table of the scales from one tensor.

    bitsandbytes has one table in the process, whereas moving a model to a device gives each layer
    its own.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear | NF4Experts)]
    for layer in layers:
        layer.scale_codes = layers[0].scale_codes


def num_weights(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; a packed one has two in each byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _kernels() -> Any:
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ModelError(
            "model.method=qlora needs bitsandbytes, not installed here: pip install 'fitune[bnb]', or use lora"
        ) from error


def replace_bitsandbytes_layers(model: nn.Module) -> None:
    """Replace 4-bit layers of bitsandbytes by layers whose weights are packed.

    bitsandbytes packs a weight when it moves to the card.
    """
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__module__.startswith("bitsandbytes")
        and type(child).__name__ in ("Linear4bit", "LinearNF4")
    ]
    _refuse_other_quantisation(model)
    if not layers:
        return
    for parent, name, child in layers:
        weight: Any = child.weight
        kind, is_double = weight.quant_type, weight.compress_statistics
        if kind != "nf4" or not is_double:
            found = f"{kind}, {'double' if is_double else 'single'} quantisation"
            raise UsageError(
                f"4-bit layers are predicted for nf4 with double quantisation, but {name} has {found}"
            )
        with torch.device("meta"):
            setattr(parent, name, NF4Linear(cast(nn.Linear, child)))
    share_tables(model)


def _refuse_other_quantisation(model: nn.Module) -> None:
    """Raise UsageError for other quantised layers of bitsandbytes.

    They are quantised when they move to the card, into sizes that no shape here shows.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        kind = type(module).__name__
        if type(weight).__name__ in ("Int8Params", "Params4bit") and kind not in (
            "Linear4bit",
            "LinearNF4",
        ):
            raise UsageError(
                f"{name} is a {kind} of bitsandbytes, which is not predicted: use 4-bit layers "
                "(nf4, double quantisation), or leave the layer as it is, which needs more"
            )
