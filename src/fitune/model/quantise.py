"""Linear layers and experts whose frozen weights are held in 4 bits: NF4 with double quantisation, as QLoRA has it
(Dettmers et al. 2023, arXiv 2305.14314). bitsandbytes has the kernels, for cards and for CPUs.

A weight of n elements takes n / 2 bytes, a byte of scale for each 64 elements, a float32 for each 256 of these scales,
a code table of 64 bytes and an offset: bitsandbytes' layout (functional.py: quantize_4bit with compress_statistics).
For a product the whole weight is unpacked into the format of the product, in the forward and again in the backward
(autograd/_functions.py: MatMul4Bit), and dropped. Without data the same is allocated by arithmetic, so a step is
recorded without the library.
"""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional
from transformers import PreTrainedModel

from fitune.errors import ModelError
from fitune.model.experts import EXPERTS, STACKED

BLOCK = 64
"""Elements that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale of their own."""
_NUM_CODES, _NUM_SCALE_CODES = 16, 256
_MOST_ELEMENTS = 2**31
"""bitsandbytes counts a tensor's elements in 32 bits."""
_LEAST_SHARE = 0.05
NOT_QUANTISED = (
    "qlora packs linear layers, and experts that transformers computes through its registry"
)


class NF4Linear(nn.Linear):
    """A linear layer with a frozen 4-bit weight: uint8 [n / 2, 1], two elements a byte. On the meta device it has the
    same tensors and no content. Its bias stays as it is."""

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
        """The weight [out, in]."""
        return _unpacked(self, (self.out_features, self.in_features), dtype)


class NF4Experts(nn.Module):
    """The frozen weights of all experts of a layer, which transformers holds in one tensor of three dimensions, in 4
    bits like `NF4Linear`. It stands in the module of the experts under the name of the tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        _pack(self, weight)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return _unpacked(self, tuple(self.shape), dtype)


def _pack(module: nn.Module, weight: Tensor) -> None:
    """Give `module` the packed weight as a parameter, and its scales as buffers."""
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
    """The whole weight. functional.py: dequantize_4bit makes the scales float32 first."""
    if packed.weight.is_meta or is_fake(packed.weight):
        scales = torch.empty(packed.scales.shape, dtype=torch.float32, device=packed.weight.device)
        weight = torch.empty(shape, dtype=dtype, device=packed.weight.device)
        del scales
        return weight
    kernels = _kernels()
    outer = kernels.QuantState(
        packed.outer_scales, code=packed.scale_codes, blocksize=SCALE_BLOCK, dtype=torch.float32
    )
    state = kernels.QuantState(
        packed.scales, shape=torch.Size(shape), code=packed.codes, blocksize=BLOCK, quant_type="nf4", dtype=dtype,
        offset=packed.offset, state2=outer,
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
    """The model with its linear layers but the head, and its experts where they are computed here, in 4 bits, one after
    the other, in place. Raises ModelError where bitsandbytes is missing or the model has no linear layers."""
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
    """The names of an experts module's weights that `grouped_experts` reads; none of any other module."""
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
    """What of a quantised model's layers stays as it is, as one clause; None where little does.

    Some architectures compute their experts by code of their own, which reads the weights as they are.
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
    """All layers read the scales' code table from one tensor, as bitsandbytes has one in the process; moving a model to
    a device gives each layer its own."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear | NF4Experts)]
    for layer in layers:
        layer.scale_codes = layers[0].scale_codes


def num_weights(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; packed ones hold two a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _kernels() -> Any:
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ModelError(
            "model.method=qlora needs bitsandbytes, not installed here: pip install 'fitune[bnb]', or use lora"
        ) from error
