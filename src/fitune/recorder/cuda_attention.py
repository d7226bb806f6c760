"""Choose and run the attention kernel that PyTorch would run on CUDA.

`cuda_attention_memory` lists what these kernels allocate. Each rule names its source: a file of
aten/src/ATen/native in PyTorch 2.14, unless another version is named.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fitune.errors import UsageError
from fitune.recorder.cuda_target import CudaTarget

aten = torch.ops.aten
Kernel = Literal["flash", "efficient", "cudnn", "math"]
_16_BIT = (torch.float16, torch.bfloat16)


# ---- choosing the kernel ----


def choose_attention(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, **call: object
) -> Kernel:
    """Return the kernel that PyTorch chooses: flash, efficient, cudnn or math.

    Source: transformers/cuda/sdp_utils.cpp, select_sdp_backend. Raises UsageError if the target
    forces flash attention and the queries do not have 16 bits.

    query: [B, H, S, d].
    call: mask (Tensor or None), dropout, is_causal, needs_gradient, enable_gqa.
    """
    if target.attention == "flash" and query.dtype not in _16_BIT:
        raise UsageError(
            f"flash attention needs 16 bits, but the queries are {query.dtype}: choose another attention"
        )
    if target.attention == "flash" or target.attention == "efficient" or target.attention == "math":
        return target.attention
    enabled: dict[Kernel, bool] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    cases: dict[Kernel, Callable[..., bool]] = {
        "cudnn": _cudnn_allowed,
        "flash": _flash_allowed,
        "efficient": _efficient_allowed,
    }
    order: tuple[Kernel, ...] = ("flash", "efficient")
    if target.generation.prefers_cudnn:
        order = ("cudnn", *order)
    elif not torch.backends.cuda.math_sdp_enabled():
        # The math kernel has priority over cuDNN (Context.h, sdp_priority_order).
        order = (*order, "cudnn")
    for kernel in order:
        if (
            enabled[kernel]
            and _shapes_allowed(query, key, value)
            and cases[kernel](target, query, key, value, **call)
        ):
            return kernel
    return "math"


def _shapes_allowed(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Check the shapes that every fused kernel requires.

    Sources: check_tensor_shapes, check_nonzero_sequence_lengths_dense and
    check_batch_size_and_num_heads_dense.
    """
    return (
        query.dim() == key.dim() == value.dim() == 4
        and 0 not in (query.shape[-2], key.shape[-2])
        and query.shape[0] == key.shape[0] == value.shape[0]
    )


def _heads_allowed(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool
) -> bool:
    """Check the numbers of heads (check_batch_size_and_num_heads_dense).

    Since 2.14 a single key and value head is allowed without `enable_gqa`.
    """
    heads, key_heads, value_heads = query.shape[1], key.shape[1], value.shape[1]
    if enable_gqa:
        return key_heads == value_heads and heads % key_heads == 0
    single = key_heads == value_heads == 1 and target.torch_version >= (2, 14)
    return heads == key_heads == value_heads or single


def _flash_allowed(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None,
    dropout: float, is_causal: bool, needs_gradient: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Check the conditions of the flash kernel."""
    head_dim = query.shape[-1]
    narrow = (
        target.compute_capability in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)) and needs_gradient
    )
    return (
        (8, 0) <= target.compute_capability <= (12, 1)
        and query.dtype in _16_BIT
        and mask is None
        and head_dim <= 256
        and head_dim == key.shape[-1] == value.shape[-1]
        and not (narrow and head_dim > 192 and (head_dim <= 224 or dropout > 0))
        and not (is_causal and query.shape[-2] != key.shape[-2])
        and _heads_allowed(target, query, key, value, enable_gqa=enable_gqa)
        and _last_dim_contiguous(query, key, value)
    )


def _efficient_allowed(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None,
    dropout: float, is_causal: bool, needs_gradient: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Check the conditions of the memory-efficient kernel.

    Grouped heads are allowed since 2.14 (pytorch #191085); before,
    `check_batch_size_and_num_heads_dense<false>` refused them. Since 2.14 the tensors must be
    aligned on cards before Ampere (check_data_ptr_alignment_mem_efficient).
    """
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
        and _heads_allowed(target, query, key, value, enable_gqa=enable_gqa and grouped)
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
        and (aligned or target.torch_version < (2, 14))
        and _last_dim_contiguous(query, key, value, mask)
    )


def _alignment(target: CudaTarget, dtype: torch.dtype) -> int:
    """Return minimum_gemm_alignment in elements: 128 bits with tensor cores."""
    if dtype in _16_BIT:
        return 8 if target.compute_capability >= (7, 0) else 1
    return 4 if target.compute_capability >= (8, 0) else 1


def _cudnn_allowed(
    target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None,
    dropout: float, is_causal: bool, needs_gradient: bool, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Check the conditions of the cuDNN kernel."""
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
        and (
            not enable_gqa or query.shape[1] % key.shape[1] == query.shape[1] % value.shape[1] == 0
        )
        and (enable_gqa or _heads_allowed(target, query, key, value, enable_gqa=False))
        and _last_dim_contiguous(query, key, value, mask)
    )


def _broadcasts(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Check that the mask broadcasts to [B, H, Sq, Sk] (check_attn_mask_shape)."""
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    sizes = tuple(mask.shape)
    return len(sizes) in (2, 4) and all(
        size in (1, expected) for size, expected in zip(sizes, wanted[-len(sizes) :], strict=True)
    )


def _last_dim_contiguous(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.stride(-1) == 1 for tensor in tensors)


# ---- running it ----


def scaled_dot_product_attention(target: CudaTarget) -> Callable[..., Tensor]:
    """Return the CUDA branch of scaled_dot_product_attention (transformers/attention.cpp)."""

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
            return _math_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        needs_gradient = torch.is_grad_enabled() and any(
            t.requires_grad for t in (query, key, value)
        )
        chosen = choose_attention(
            target, query, key, value, mask=attn_mask, dropout=dropout_p, is_causal=is_causal,
            needs_gradient=needs_gradient, enable_gqa=enable_gqa,
        )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # convert_boolean_attn_mask
            zero = attn_mask.new_full((), 0.0, dtype=query.dtype)
            infinite = attn_mask.new_full((), float("-inf"), dtype=query.dtype)
            attn_mask = torch.where(attn_mask, zero, infinite)
            del zero, infinite
        if chosen == "flash":
            return flash_attention(
                query, key, value, dropout=dropout_p, is_causal=is_causal, scale=scale
            )
        if chosen == "efficient":
            repeats = query.shape[1] // key.shape[1]
            # Before 2.14 this kernel took no grouped heads: a caller who forced it repeated them.
            if repeats > 1 and target.torch_version < (2, 14):
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
                    query,
                    key,
                    value,
                    attn_mask,
                    needs_gradient,
                    dropout_p,
                    is_causal,
                    False,
                    scale=scale,
                )
            )
        return _math_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    return kernel


class MathAttention:
    """Marks the time during which `_scaled_dot_product_attention_math` runs.

    That operator writes into its scores in place (transformers/attention.cpp), but allocates new
    ones under a dispatch mode.
    """

    runs = False


def _math_attention(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
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


def with_grouped_heads(args: Sequence[Any], result: Any) -> object:
    """Return the efficient kernel's gradients with as many key and value heads as the inputs have.

    The installed PyTorch may compute those gradients for every query head.
    """
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Return flash attention of [B, H, S, d].

    A head size that is no multiple of 8 is padded before the kernel and cut after it
    (pad_last_dim<8>).
    """
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if padding := -head_dim % 8:
        query, key, value = (torch.nn.functional.pad(t, (0, padding)) for t in (query, key, value))
    out = _first(
        aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, is_causal, False, scale=scale
        )
    )
    return out[..., :head_dim] if padding else out


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Pad the mask's rows to a multiple of 16 elements and expand it (preprocess_mask).

    Returns a view of [B, H, Sq, Sk].
    """
    length = mask.shape[-1]
    if padding := -length % 16:
        mask = torch.nn.functional.pad(mask, (0, padding))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
