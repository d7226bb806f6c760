"""Attention on CUDA: which kernel PyTorch chooses, and what the kernels allocate besides their outputs.

Sources are files of aten/src/ATen/native in PyTorch 2.14 unless another version is named.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fitune.errors import UsageError
from fitune.trace.allocation import FREE, Allocation, Free, Output
from fitune.trace.cuda_target import CudaTarget

aten = torch.ops.aten
Steps = Sequence[Allocation]
Kernel = Literal["flash", "efficient", "cudnn", "math"]
_16_BIT = (torch.float16, torch.bfloat16)


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose_attention(target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Kernel:
    """PyTorch's choice of kernel (transformers/cuda/sdp_utils.cpp: select_sdp_backend): flash, efficient, cudnn, math.

    query: [B, H, S, d]. call: mask (Tensor or None), dropout, is_causal, needs_gradient, enable_gqa.
    """
    if target.attention == "flash" and query.dtype not in _16_BIT:
        raise UsageError(f"flash attention needs 16 bits, but the queries are {query.dtype}: choose another attention")
    if target.attention == "flash" or target.attention == "efficient" or target.attention == "math":
        return target.attention
    enabled: dict[Kernel, bool] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    cases: dict[Kernel, Callable[..., bool]] = {"cudnn": _cudnn_can, "flash": _flash_can, "efficient": _efficient_can}
    order: tuple[Kernel, ...] = ("flash", "efficient")
    if target.generation.prefers_cudnn:
        order = ("cudnn", *order)
    elif not torch.backends.cuda.math_sdp_enabled():  # which stands before cuDNN (Context.h, sdp_priority_order)
        order = (*order, "cudnn")
    for kernel in order:
        if enabled[kernel] and _lengths_can(query, key, value) and cases[kernel](target, query, key, value, **call):
            return kernel
    return "math"


def _lengths_can(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """check_tensor_shapes, check_nonzero_sequence_lengths_dense and check_batch_size_and_num_heads_dense."""
    return (
        query.dim() == key.dim() == value.dim() == 4
        and 0 not in (query.shape[-2], key.shape[-2])
        and query.shape[0] == key.shape[0] == value.shape[0]
    )


def _heads_can(target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> bool:
    """check_batch_size_and_num_heads_dense: one head for all queries needs no permission since 2.14."""
    heads, key_heads, value_heads = query.shape[1], key.shape[1], value.shape[1]
    if enable_gqa:
        return key_heads == value_heads and heads % key_heads == 0
    single = key_heads == value_heads == 1 and target.torch_version >= (2, 14)
    return heads == key_heads == value_heads or single


def _flash_can(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *,
    mask: Tensor | None, dropout: float, is_causal: bool, needs_gradient: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    head_dim = query.shape[-1]
    narrow = target.compute_capability in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)) and needs_gradient
    return (
        (8, 0) <= target.compute_capability <= (12, 1)
        and query.dtype in _16_BIT
        and mask is None
        and head_dim <= 256
        and head_dim == key.shape[-1] == value.shape[-1]
        and not (narrow and head_dim > 192 and (head_dim <= 224 or dropout > 0))
        and not (is_causal and query.shape[-2] != key.shape[-2])
        and _heads_can(target, query, key, value, enable_gqa=enable_gqa)
        and _last_dim_contiguous(query, key, value)
    )


def _efficient_can(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *,
    mask: Tensor | None, dropout: float, is_causal: bool, needs_gradient: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Grouped heads since 2.14 (pytorch #191085); before, `check_batch_size_and_num_heads_dense<false>` sent them
    elsewhere. Tensors may begin anywhere before 2.14 (check_data_ptr_alignment_mem_efficient)."""
    alignment = _alignment(target, query.dtype)
    step = alignment * query.element_size()
    aligned = target.compute_capability < (8, 0) or not any(
        each.storage_offset() * each.element_size() % step for each in (query, key, value)
    )
    grouped = target.torch_version >= (2, 14)
    return (
        (5, 0) <= target.compute_capability <= (12, 1)
        and (
            query.dtype in (torch.float16, torch.float32)
            or (query.dtype == torch.bfloat16 and target.compute_capability >= (8, 0))
        )
        and query.shape[-1] == key.shape[-1]
        and _heads_can(target, query, key, value, enable_gqa=enable_gqa and grouped)
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
        and (aligned or target.torch_version < (2, 14))
        and _last_dim_contiguous(query, key, value, mask)
    )


def _alignment(target: CudaTarget, dtype: torch.dtype) -> int:
    """minimum_gemm_alignment: 128 bits in tensor cores."""
    if dtype in _16_BIT:
        return 8 if target.compute_capability >= (7, 0) else 1
    return 4 if target.compute_capability >= (8, 0) else 1


def _cudnn_can(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *,
    mask: Tensor | None, dropout: float, is_causal: bool, needs_gradient: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    wide = target.compute_capability[0] in (9, 10)
    head_dims = query.shape[-1], value.shape[-1]
    backward = max(head_dims) <= 128 or head_dims in ((192, 128), (256, 256))
    lengths = query.shape[-2], key.shape[-2]
    return (
        (8, 0) <= target.compute_capability <= (12, 1)
        and query.dtype in _16_BIT
        and (mask is None or (not mask.requires_grad and _broadcasts(mask, query, key)))
        and dropout * 16 == int(dropout * 16)
        and all(head_dim % 8 == 0 for head_dim in head_dims)
        and max(head_dims) <= (256 if wide else 128)
        and (backward or not (wide and needs_gradient))
        and lengths[1] != 1
        and not (dropout and lengths[0] == 1)
        and (not enable_gqa or query.shape[1] % key.shape[1] == query.shape[1] % value.shape[1] == 0)
        and (enable_gqa or _heads_can(target, query, key, value, enable_gqa=False))
        and _last_dim_contiguous(query, key, value, mask)
    )


def _broadcasts(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """check_attn_mask_shape"""
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    sizes = tuple(mask.shape)
    return len(sizes) in (2, 4) and all(
        size in (1, its) for size, its in zip(sizes, wanted[-len(sizes) :], strict=True)
    )


def _last_dim_contiguous(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.stride(-1) == 1 for tensor in tensors)


# ---- carrying it out -------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(target: CudaTarget) -> Callable[..., Tensor]:
    """transformers/attention.cpp: scaled_dot_product_attention, its CUDA branch."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(query, FakeTensor) or query.dim() != 4:
            return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        chosen = choose_attention(
            target, query, key, value, mask=attn_mask, dropout=dropout_p, is_causal=is_causal,
            needs_gradient=needs_gradient, enable_gqa=enable_gqa,
        )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zero, infinite = (attn_mask.new_full((), each, dtype=query.dtype) for each in (0.0, float("-inf")))
            attn_mask = torch.where(attn_mask, zero, infinite)  # convert_boolean_attn_mask
            del zero, infinite
        if chosen == "flash":
            return flash_attention(query, key, value, dropout=dropout_p, is_causal=is_causal, scale=scale)
        if chosen == "efficient":
            repeats = query.shape[1] // key.shape[1]
            if repeats > 1 and target.torch_version < (2, 14):  # forced: the caller has to repeat the heads
                key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
            if attn_mask is not None:
                attn_mask = _aligned_bias(attn_mask, query, key)
            return _first(
                aten._scaled_dot_product_efficient_attention(
                    query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
                )
            )
        if chosen == "cudnn":
            return _first(
                aten._scaled_dot_product_cudnn_attention(
                    query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, False, scale=scale
                )
            )
        return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    return kernel


class MathAttention:
    """Whether the operators of `_scaled_dot_product_attention_math` run, which writes into its scores
    (transformers/attention.cpp) where no dispatch mode looks on."""

    runs = False


def _math_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    mask, dropout, is_causal, scale, enable_gqa = rest
    MathAttention.runs = True
    try:
        return _first(
            aten._scaled_dot_product_attention_math(
                query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        )
    finally:
        MathAttention.runs = False


def _safe_softmax(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """SoftMax.cpp, _safe_softmax: which scores are minus infinity, in which rows all are, and a zero for these."""
    scores, dim = args[0], args[1]
    return scores.numel(), scores.numel() // max(1, scores.shape[dim]), scores.element_size()


def with_grouped_heads(args: Sequence[Any], result: Any) -> Any:
    """The gradients of the efficient kernel, where the installed PyTorch makes those of the keys for all heads."""
    grad_query, *others = result
    shaped = [
        source.new_empty(_rows_first(source.shape)).transpose(1, 2)
        if grad.numel() and grad.shape != source.shape
        else grad
        for grad, source in zip(others[:2], args[2:4], strict=True)
    ]
    return grad_query, *shaped, *others[2:]


def _rows_first(shape: Sequence[int]) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1], shape[3]


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, is_causal: bool, scale: float | None
) -> Tensor:
    """[B, H, S, d]. pad_last_dim<8>: a head size that is no multiple of 8 is padded before and cut after the kernel."""
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if padding := -head_dim % 8:
        query, key, value = (torch.nn.functional.pad(t, (0, padding)) for t in (query, key, value))
    out = _first(aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale))
    return out[..., :head_dim] if padding else out


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """preprocess_mask: rows padded to a multiple of 16 elements, then a view of [B, H, Sq, Sk]."""
    length = mask.shape[-1]
    if padding := -length % 16:
        mask = torch.nn.functional.pad(mask, (0, padding))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


# ---- what the kernels allocate ---------------------------------------------------------------------------------------


def _flash_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """transformers/cuda/flash_attn/flash_api.cpp, mha_fwd: where few blocks would work, the keys are split, each part
    with float32 results of its own (set_params_splitkv); with dropout, where the generator stands is kept twice."""
    query, key, dropout = args[0], args[1], args[3]
    if dropout:
        return Output(0), Output(1), 16, Output(3), Output(2)
    batch, heads, length, head_dim = query.shape
    num_splits = _num_splits(
        batch * heads * ceil(length / 64),
        most=2 * target.num_multiprocessors,
        num_blocks=ceil(key.shape[2] / (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64)),
    )
    if num_splits == 1:
        return ()
    rows = num_splits * batch * heads * length
    return Output(0), Output(1), rows * 4, rows * _rounded_head(head_dim) * 4, Output(2), Output(3)


def _num_splits(num_rows: int, *, most: int, num_blocks: int) -> int:
    """flash_api.cpp, num_splits_heuristic: the fewest with which the multiprocessors are busy for 85 % of the time that
    they could be at best."""
    if num_rows >= 0.8 * most:
        return 1
    busy: dict[int, float] = {}
    for number in range(1, min(128, most, num_blocks) + 1):
        if number == 1 or ceil(num_blocks / number) != ceil(num_blocks / (number - 1)):
            waves = num_rows * number / most
            busy[number] = waves / ceil(waves)
    best = max(busy.values())
    return next(number for number, share in busy.items() if share >= 0.85 * best)


def _flash_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """transformers/cuda/attention_backward.cu: the output and its gradient in rows of heads, if they are not yet;
    flash_api.cpp, mha_bwd: softmax_d, dq_accum, and dk, dv for every query head."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = _ceil_to(length, 128)
    copies = [each.numel() * each.element_size() for each in (args[0], args[4]) if not _is_rows_of_heads(each)]
    expanded = batch * heads * key.shape[2] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    results = Output(0), Output(1), Output(2)
    return *copies, *results, batch * heads * rows * 4, batch * heads * rows * _rounded_head(head_dim) * 4, *grouped


def _is_rows_of_heads(tensor: Tensor) -> bool:
    """Whether [B, H, S, d] lies in memory as [B, S, H, d]."""
    expected = 1
    for dim in (3, 1, 2, 0):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True


def _varlen_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """flash_api.cpp, mha_varlen_bwd: as above over the flat positions, each row padded to 128."""
    query, key, boundaries = args[1], args[2], args[6]
    tokens, heads, head_dim = query.shape
    num_rows = boundaries.shape[0] - 1
    if _varlen_in_cudnn(target, query, key):
        return *_ragged(num_rows), _cudnn_workspace(num_rows, heads, args[8], head_dim)
    rows = tokens + 128 * num_rows
    expanded = heads * key.shape[0] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    return heads * rows * 4, rows * heads * _rounded_head(head_dim) * 4, *grouped


def _varlen_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """torch/nn/attention/varlen.py: the generator's place is of the operator's own making, that of the kernel is
    dropped. In cuDNN, lengths and offsets of the rows."""
    query, key, boundaries = args[0], args[1], args[3]
    if _varlen_in_cudnn(target, query, key):
        lengths = _ragged(boundaries.shape[0] - 1)
        return 8, 8, Output(0), Output(1), *lengths, FREE, FREE, FREE, FREE, Output(2)
    return Output(0), Output(1), 16, 8, FREE, Output(2)


def _varlen_in_cudnn(target: CudaTarget, query: Tensor, key: Tensor) -> bool:
    return False


def _ragged(num_rows: int) -> tuple[int, ...]:
    return num_rows * 4, num_rows * 4, (num_rows + 1) * 4, (num_rows + 1) * 4


def _rounded_head(head_dim: int) -> int:
    return _ceil_to(head_dim, 32 if head_dim <= 128 else 64)


def _cudnn_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """cudnn/MHA.cpp: seed and offset come first. The workspace of cuDNN's own plan is not known."""
    for_backward = bool(args[4])
    return Output(2), Output(3), Output(0), Output(1, on_host=not for_backward)


def _cudnn_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """cudnn_frontend, scaled_dot_product_flash_attention_bwd: the sum over each row and dq in float32."""
    batch, heads, length, head_dim = args[1].shape
    return (_cudnn_workspace(batch, heads, length, head_dim),)


def _cudnn_workspace(batch: int, heads: int, length: int, head_dim: int) -> int:
    return batch * heads * length * (1 + head_dim) * 4


def _efficient_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """transformers/cuda/attention.cu: seed and offset come first, with dropout on the host; long heads of 16 bits are
    accumulated in float32."""
    query, value, dropout = args[0], args[2], args[5]
    born = Output(2, on_host=dropout > 0), Output(3, on_host=dropout > 0), Output(0), Output(1)
    if query.element_size() == 4 or value.shape[-1] <= 128:
        return born
    return *born, query.shape[0] * query.shape[1] * query.shape[2] * value.shape[-1] * 4


def _efficient_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h (Params::workspace_size): dk and
    dv of every query head; delta, computed by the kernel in 16 bits, by a float32 product and its sum else; then a
    float32 accumulator for dq, and for dk and dv in 16 bits where they do not stay in registers."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    half, dropout = query.element_size() == 2, args[9] > 0
    rows, columns, in_registers = _efficient_block(target, half, head_dim, dropout=dropout)
    splits = ceil(key.shape[2] / columns)
    if in_registers and batch * heads >= 256 and splits <= 2:
        splits = 1
    elif not in_registers:
        splits = max(1, min(splits, 200 // (batch * heads)))
    dq = ceil(length / rows) * ceil(head_dim / columns) * (rows * columns + 4)
    dk_dv = 0 if in_registers or not half else 2 * splits * columns * _ceil_to(head_dim, rows)
    workspace = batch * heads * _ceil_to(dq + dk_dv, 4) * 4
    expanded = batch * heads * key.shape[2] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    delta = batch * heads * length * 4
    if half:
        return *grouped, delta, workspace
    first = len(grouped)
    if heads == 1 or length == 1:  # already in the order of the kernel
        return *grouped, delta * head_dim, delta, Free(first), workspace
    return *grouped, delta * head_dim, delta, delta, Free(first), Free(first + 1), workspace


def _efficient_block(target: CudaTarget, half: bool, head_dim: int, *, dropout: bool) -> tuple[int, int, bool]:
    """(rows, columns, whether dk and dv stay in registers) of the first kernel in kernels/cutlassB.h that takes
    head_dim and fits the card's shared memory."""
    capability, large = target.compute_capability, target.generation.large_shared_memory
    if head_dim <= 64:
        return 64, 64, half
    if not half:
        return (128, 64, False) if large else (64, 64, False)
    if head_dim <= 128:
        if large:
            return 128, 128, True
        fits = capability < (8, 0) or (head_dim <= 96 and capability in ((8, 6), (8, 9)) and not dropout)
        return (128, 64, True) if fits else (64, 64, False)
    return 128, 64, False


def _ceil_to(number: int, step: int) -> int:
    return ceil(number / step) * step


ATTENTION_RULES: dict[str, Callable[[CudaTarget, Sequence[Any]], Steps]] = {
    "aten::_scaled_dot_product_flash_attention": _flash_forward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_safe_softmax": _safe_softmax,
    "aten::_flash_attention_backward": _varlen_backward,
    "torch_attn::_varlen_attn": _varlen_forward,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
    "aten::_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "aten::_scaled_dot_product_efficient_attention": _efficient_forward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}
