"""List what CUDA's attention kernels allocate besides and between their outputs.

Each rule names its source: a file of aten/src/ATen/native in PyTorch 2.14, unless another version
is named. A rule returns its steps as `allocation` defines them.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from torch import Tensor

from fitune.recorder.allocation import FREE, Allocation, Free, Output
from fitune.recorder.cuda_target import CudaTarget

Steps = Sequence[Allocation]


def _safe_softmax(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the temporaries of _safe_softmax (SoftMax.cpp).

    They are the mask of scores that are minus infinity, the mask of rows that are so as a whole,
    and the zero that replaces these rows.
    """
    scores, dim = args[0], args[1]
    return scores.numel(), scores.numel() // max(1, scores.shape[dim]), scores.element_size()


def _flash_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of the flash kernel's forward.

    Source: transformers/cuda/flash_attn/flash_api.cpp, mha_fwd. If few blocks would be busy, the
    keys are split, and each split has float32 results of its own (set_params_splitkv). With
    dropout, the random generator's state is stored twice.
    """
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
    """Return the number of splits that flash_api.cpp's num_splits_heuristic chooses.

    It is the smallest number with which the multiprocessors are busy for 85 % of the best possible
    share of the time.
    """
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
    """List the allocations of the flash kernel's backward.

    Sources: transformers/cuda/attention_backward.cu copies the output and its gradient to the
    layout [B, S, H, d], unless they have it. flash_api.cpp, mha_bwd, allocates softmax_d, dq_accum,
    and dk and dv for every query head.
    """
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = _ceil_to(length, 128)
    copies = [
        each.numel() * each.element_size()
        for each in (args[0], args[4])
        if not _is_rows_of_heads(each)
    ]
    expanded = batch * heads * key.shape[2] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    results = Output(0), Output(1), Output(2)
    return (
        *copies,
        *results,
        batch * heads * rows * 4,
        batch * heads * rows * _rounded_head(head_dim) * 4,
        *grouped,
    )


def _is_rows_of_heads(tensor: Tensor) -> bool:
    """Return whether [B, H, S, d] is stored as [B, S, H, d]."""
    expected = 1
    for dim in (3, 1, 2, 0):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True


def _varlen_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of the variable-length backward (flash_api.cpp, mha_varlen_bwd).

    They are those of `_flash_backward` over the packed tokens, with each sample padded to 128
    tokens; the output and its gradient are copied unless they are contiguous.
    """
    query, key, boundaries = args[1], args[2], args[6]
    tokens, heads, head_dim = query.shape
    num_rows = boundaries.shape[0] - 1
    if _varlen_in_cudnn(target, query, key):
        return *_ragged(num_rows), _cudnn_workspace(num_rows, heads, args[8], head_dim)
    rows = tokens + 128 * num_rows
    copies = [
        each.numel() * each.element_size()
        for each in (args[0], args[4])
        if not each.is_contiguous()
    ]
    results = Output(0), Output(1), Output(2)
    expanded = heads * key.shape[0] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    accumulated = rows * heads * _rounded_head(head_dim) * 4
    return *copies, *results, heads * rows * 4, accumulated, *grouped


def _varlen_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of the variable-length forward (torch/nn/attention/varlen.py).

    The operator allocates a random generator state of its own and drops the kernel's. cuDNN needs
    the lengths and offsets of the samples.
    """
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


def _cudnn_forward(target: CudaTarget, args: Sequence[object]) -> Steps:
    """List the allocations of cuDNN's forward (cudnn/MHA.cpp): seed and offset are allocated first.

    The workspace of cuDNN's execution plan is not known.
    """
    for_backward = bool(args[4])
    return Output(2), Output(3), Output(0), Output(1, on_host=not for_backward)


def _cudnn_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of cuDNN's backward: a sum for each row, and dq in float32.

    Source: cudnn_frontend, scaled_dot_product_flash_attention_bwd.
    """
    batch, heads, length, head_dim = args[1].shape
    return (_cudnn_workspace(batch, heads, length, head_dim),)


def _cudnn_workspace(batch: int, heads: int, length: int, head_dim: int) -> int:
    return batch * heads * length * (1 + head_dim) * 4


def _efficient_forward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of the efficient kernel's forward (transformers/cuda/attention.cu).

    Seed and offset are allocated first, with dropout on the host. Heads of more than 128 elements
    in 16 bits are accumulated in float32.
    """
    query, value, dropout = args[0], args[2], args[5]
    outputs = Output(2, on_host=dropout > 0), Output(3, on_host=dropout > 0), Output(0), Output(1)
    if query.element_size() == 4 or value.shape[-1] <= 128:
        return outputs
    return *outputs, query.shape[0] * query.shape[1] * query.shape[2] * value.shape[-1] * 4


def _efficient_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of the efficient kernel's backward.

    Sources: transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h
    (Params::workspace_size). It allocates dk and dv of every query head; then delta, which the
    kernel computes in 16 bits, and which otherwise is a float32 product and its sum; then a float32
    accumulator for dq, and in 16 bits also for dk and dv if they do not fit in registers.
    """
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
    if heads == 1 or length == 1:  # delta needs no copy to the kernel's layout
        return *grouped, delta * head_dim, delta, Free(first), workspace
    return *grouped, delta * head_dim, delta, delta, Free(first), Free(first + 1), workspace


def _efficient_block(
    target: CudaTarget, half: bool, head_dim: int, *, dropout: bool
) -> tuple[int, int, bool]:
    """Return (rows, columns, whether dk and dv stay in registers) of the kernel that is used.

    That is the first kernel in kernels/cutlassB.h that takes head_dim and fits the card's shared
    memory.
    """
    capability, large = target.compute_capability, target.generation.large_shared_memory
    if head_dim <= 64:
        return 64, 64, half
    if not half:
        return (128, 64, False) if large else (64, 64, False)
    if head_dim <= 128:
        if large:
            return 128, 128, True
        fits = capability < (8, 0) or (
            head_dim <= 96 and capability in ((8, 6), (8, 9)) and not dropout
        )
        return (128, 64, True) if fits else (64, 64, False)
    return 128, 64, False


def _ceil_to(number: int, step: int) -> int:
    return ceil(number / step) * step


#: operator -> its rule, which returns the allocation steps for the operator's arguments
ATTENTION_RULES: dict[str, Callable[[CudaTarget, Sequence[object]], Steps]] = {
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
