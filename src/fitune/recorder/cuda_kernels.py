"""List what CUDA's kernels allocate besides and between their outputs.

There is one table of rules by operator. A rule returns its steps as `allocation` defines them. Each
rule names its source: a file of aten/src/ATen in PyTorch 2.14, unless another version is named.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from fitune.recorder.allocation import FREE, Allocation, Free, Output, resolve
from fitune.recorder.cuda_attention_memory import ATTENTION_RULES
from fitune.recorder.cuda_reductions import Card, Reduction, scratch
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.operators import by_operator

aten = torch.ops.aten
Steps = Sequence[Allocation]
Rule = Callable[[CudaTarget, Sequence[Any]], Steps]

#: cub's scans align their scratch memory to this, apart from the states of the tiles
_PARTIALS = 256
#: added by cub so that it can begin at a multiple of 256 bytes
_ALIGNED = 255


# ---- reductions ----


def _dims(tensor: Tensor, dims: Any) -> frozenset[int]:
    if isinstance(dims, int):
        dims = (dims,)
    return (
        frozenset(each % tensor.dim() for each in dims or range(tensor.dim()))
        if tensor.dim()
        else frozenset()
    )


def _reduce(
    target: CudaTarget,
    tensor: Tensor,
    dims: object,
    *,
    partial: int,
    output: int = 4,
    read_as: int | None = None,
) -> list[Allocation]:
    """List the scratch memory of a reduction over `dims`.

    partial: bytes of what a thread accumulates.
    output: bytes of an output element.
    read_as: bytes of an input element, if the kernel reads a converted copy.
    """
    offset = int(tensor.storage_offset()) if read_as is None else 0
    size = read_as or tensor.element_size()
    reduction = Reduction(
        tuple(tensor.shape), tensor.stride(), offset, _dims(tensor, dims), size, partial, output
    )
    steps: list[Allocation] = []
    for part in scratch(reduction, Card(target.num_multiprocessors, target.generation.threads)):
        steps += (*part, *(FREE,) * len(part))
    return steps


def _sum(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of sum and mean.

    Sources: native/cuda/ReduceSumProdKernel.cu and ReduceMomentKernel.cu. An input that is not of
    the output's dtype is converted first (native/ReduceOps.cpp, make_reduction_from_out_ty), but
    one kernel reads 16 bits and writes float32.
    """
    tensor, dims = args[0], args[1] if len(args) == 4 else None
    dtype = args[-1] or (tensor.dtype if tensor.is_floating_point() else torch.int64)
    size, partial = dtype.itemsize, max(4, dtype.itemsize)
    if dtype == tensor.dtype or (
        dtype == torch.float32 and tensor.dtype in (torch.float16, torch.bfloat16)
    ):
        return _reduce(target, tensor, dims, partial=partial, output=size)
    converted = _reduce(target, tensor, dims, partial=partial, output=size, read_as=size)
    return [tensor.numel() * size, *converted]


def _moments(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of var and std (native/cuda/ReduceMomentKernel.cu).

    A thread accumulates mean, sum of squares and counts, 16 bytes in all.
    """
    dims = args[1] if not isinstance(args[1], bool) else None
    return _reduce(target, args[0], dims, partial=16, output=args[0].element_size())


def _norm(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of a vector norm (native/cuda/ReduceNormKernel.cu)."""
    output = (args[4] or args[0].dtype).itemsize
    return _reduce(target, args[0], args[2], partial=4, output=output)


def _extremum(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of max and min, which accumulate in the input's dtype.

    Sources: native/cuda/ReduceMaxValuesKernel.cu, ReduceMinValuesKernel.cu.
    """
    size = args[0].element_size()
    return _reduce(target, args[0], args[1] if len(args) > 1 else None, partial=size, output=size)


def _extremum_with_index(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of max, min, argmax and argmin over a dimension.

    They accumulate a value and a 64-bit index. Sources: native/cuda/ReduceArgMaxKernel.cu and
    ReduceMaxValuesKernel.cu.
    """
    return _reduce(target, args[0], args[1], partial=16, output=8)


def _both_extrema(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of aminmax (native/cuda/ReduceAMinMaxKernel.cu)."""
    return _reduce(
        target, args[0], args[1], partial=2 * args[0].element_size(), output=args[0].element_size()
    )


def _truth(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of any and all (native/cuda/ReduceLogicKernel.cu)."""
    return _reduce(target, args[0], args[1] if len(args) > 1 else None, partial=1, output=1)


def _count_nonzero(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of count_nonzero (native/TensorAdvancedIndexing.cpp).

    The mask of nonzero elements is converted to 64-bit numbers, which are summed.
    """
    number = args[0].numel()
    return [
        number,
        Output(0),
        8 * number,
        *_reduce(target, args[0], args[1], partial=8, output=8, read_as=8),
    ]


def _log_sum_exp(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of logsumexp (native/ReduceOps.cpp, logsumexp_out_impl).

    They are the maxima, the mask of infinite maxima, and the exponentials.
    """
    tensor, dims = args[0], args[1]
    size = tensor.element_size()
    num_outputs = tensor.numel() // max(1, prod(tensor.shape[dim] for dim in _dims(tensor, dims)))
    maxima = _reduce(target, tensor, dims, partial=size, output=size)
    sums = _reduce(target, tensor, dims, partial=4, output=size)
    return [
        num_outputs * size, *maxima, num_outputs * size, num_outputs, FREE, FREE,
        tensor.numel() * size, Output(0), *sums,
    ]  # fmt: skip


# ---- cub ----


def _scan_bytes(number: int, *, tile: int, state: int = 16) -> int:
    """Return the scratch bytes of cub::DeviceScan and DeviceSelect.

    They hold the state of each tile, and of one warp before the first tile.
    """
    return _ALIGNED + _PARTIALS + _ceil_to(state * (ceil(number / tile) + 32), 256)


def _sort_bytes(target: CudaTarget, number: int, *, num_bits: int) -> int:
    """Return the scratch bytes of cub::DeviceRadixSort for pairs of 64-bit numbers.

    Source: dispatch_radix_sort.cuh, onesweep. Each pass covers 8 bits and has 256 counts, in all
    and for each tile. Several passes also need a copy of the pairs.
    """
    if number <= _SINGLE_TILE:
        return 1
    passes = ceil(num_bits / 8)
    pairs = 2 * _ceil_to(8 * number, 256) if passes > 1 else 0
    return (
        _ALIGNED + 256 + passes * 2048 + ceil(number / target.generation.sort_tile) * 1024 + pairs
    )


#: Up to so many pairs are sorted by a single tile, with 1 byte of scratch memory
_SINGLE_TILE = 2304
#: Elements in a tile of a scan of 64-bit numbers
_SCAN_TILE = 896


def _num_bits(largest: int) -> int:
    return max(1, largest.bit_length())


def _embedding_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of the embedding's backward.

    Sources: native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu. More than 3,072 tokens are
    sorted, and summed per segment in float32; if there are few segments, each is split into parts
    that are summed at the same time.
    """
    grad, indices, num_weights = args[0], args[1], args[2]
    tokens = indices.numel()
    if tokens <= 3072:
        return ()
    token_bytes = tokens * 8
    segments = min(tokens, num_weights)
    partial = tokens // 10 + segments  # NROWS_PER_THREAD
    sums = (partial * grad.shape[-1] * max(4, grad.element_size()),)
    if partial > 4 * segments and segments < 4 * target.num_multiprocessors:
        sums = (
            partial * 8,
            *((segments * grad.shape[-1] * 4,) if grad.element_size() == 2 else ()),
        )
    return (
        token_bytes, token_bytes,
        token_bytes, _sort_bytes(target, tokens, num_bits=_num_bits(num_weights)), FREE, FREE,
        Output(0),
        token_bytes, 8, token_bytes,
        _scan_bytes(tokens, tile=target.generation.unique_tile), FREE, FREE,
        segments * 8, segments * 8, _scan_bytes(segments, tile=_SCAN_TILE), FREE,
        8, partial * 8, *sums,
    )  # fmt: skip


def _index_put(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of index_put with accumulation, which sorts the indices.

    Source: native/cuda/Indexing.cu, index_put_with_sort_kernel. Unless the caller says that the
    indices are in range (`unsafe`), their minimum and maximum are computed first.
    """
    tensor, indices, _, accumulates, *rest = args
    unsafe = bool(rest and rest[0])
    known = [(dim, each) for dim, each in enumerate(indices) if each is not None]
    if not accumulates or len(known) != 1 or known[0][1].dtype != torch.int64:
        return ()
    ((dim, index),) = known
    number, each = index.numel(), index.numel() * 8
    num_slices = prod(tensor.shape[: dim + 1])
    checks = () if unsafe else (8, 8, 1, FREE, 1, FREE, FREE, FREE)
    return (
        *checks, each, each, Free(0 if unsafe else 4),
        each, each, each, _sort_bytes(target, number, num_bits=_num_bits(num_slices)),
    )  # fmt: skip


def _index(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of indexing by several tensors.

    Source: native/TensorAdvancedIndexing.cpp, make_info. If the indices differ in layout after they
    are expanded to their common shape, they are copied to contiguous ones first.
    """
    indices = [each for each in args[1] if each is not None]
    shape = torch.broadcast_shapes(*(each.shape for each in indices))
    strides = [_expanded_stride(each, shape) for each in indices]
    if len(set(strides)) < 2 or any(each.dtype == torch.bool for each in indices):
        return ()
    whole = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
    copies = [prod(shape) * 8 for stride in strides if stride != whole]
    return (*copies, Output(0))


def _expanded_stride(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    own = zip(tensor.shape, tensor.stride(), shape[len(shape) - tensor.dim() :], strict=True)
    return (0,) * (len(shape) - tensor.dim()) + tuple(
        stride if size == wanted else 0 for size, stride, wanted in own
    )


def _cumulative_sum(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of cumsum.

    Sources: native/ReduceOps.cpp converts an input of another dtype than the sum. ScanKernels.cpp
    and cuda/cub.cuh scan a flat tensor with cub.
    """
    tensor, dim = args[0], args[1]
    dtype = args[2] or (tensor.dtype if tensor.is_floating_point() else torch.int64)
    converted = () if dtype == tensor.dtype else (tensor.numel() * dtype.itemsize,)
    if not tensor.dim() or tensor.numel() != tensor.shape[dim] or tensor.numel() < 2:
        return converted
    if dtype == torch.float32:
        return (*converted, _scan_bytes(tensor.numel(), tile=1920, state=8))
    return (
        *converted,
        _scan_bytes(tensor.numel(), tile=7680 if dtype.itemsize == 2 else _SCAN_TILE),
    )


def _sort(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of sort (native/cuda/Sort.cpp, SortStable.cu).

    They hold the indices of a row; rows of more than 4,096 elements are sorted by radix sort.
    """
    tensor = args[0]
    dim = args[2] if isinstance(args[1], bool) or args[1] is None else args[1]
    length = tensor.shape[dim] if tensor.dim() else 1
    if length > 4096 and tensor.numel() == length and tensor.dtype == torch.int64:
        return length * 8, _sort_bytes(target, length, num_bits=64)
    return (length * 8,) if length <= 4096 else ()


def _bincount(target: CudaTarget, args: Sequence[object]) -> Steps:
    """List the allocations of bincount: minimum and maximum (native/cuda/SummaryOps.cu)."""
    return 8, 8, Output(0)


# ---- products ----


def _product(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of a matrix product: copies of operands that cuBLAS cannot read.

    Those are matrices in which neither rows nor columns are contiguous. Sources:
    native/cuda/Blas.cpp and cublasCommonArgs.h, prepare_matrix_for_cublas.
    """
    return tuple(
        each.numel() * each.element_size()
        for each in (args if len(args) == 2 else args[1:3])
        if not _is_matrix(each)
    )


def _is_matrix(tensor: Tensor) -> bool:
    (rows, columns), (down, across) = tensor.shape, tensor.stride()
    return (down == 1 and across >= max(1, rows)) or (across == 1 and down >= max(1, columns))


# ---- others ----


def _softmax_backward(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of softmax's backward: the gradient times the output.

    Source: native/cuda/SoftMax.cu, softmax_backward_cuda_out.
    """
    return (args[1].numel() * args[1].element_size(),)


def _dropout(target: CudaTarget, args: Sequence[object]) -> Steps:
    """List the allocations of dropout: the mask is allocated first (native/cuda/Dropout.cu)."""
    return Output(1), Output(0)


def _foreach_norm(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of _foreach_norm (native/cuda/ForeachReduceOp.cu).

    Before the norms it allocates one partial norm for each tensor and each chunk of 65,536 elements
    of the largest tensor.
    """
    num_bytes = _num_chunks(args[0]) * max(4, args[0][0].element_size())
    return num_bytes, *(Output(number) for number in range(len(args[0])))


def _foreach_max(target: CudaTarget, args: Sequence[Any]) -> Steps:
    """List the allocations of _foreach_max: partial maxima like those of `_foreach_norm`.

    They are allocated after the outputs.
    """
    return (_num_chunks(args[0]) * args[0][0].element_size(),)


def _num_chunks(tensors: Sequence[Tensor]) -> int:
    return len(tensors) * max(ceil(tensor.numel() / 65536) for tensor in tensors)


def _ceil_to(number: int, step: int) -> int:
    return ceil(number / step) * step


_RULES: dict[str, Rule] = {
    **ATTENTION_RULES,
    "aten::sum": _sum,
    "aten::sum.dim_IntList": _sum,
    "aten::mean": _sum,
    "aten::mean.dim": _sum,
    "aten::var_mean.correction": _moments,
    "aten::var.correction": _moments,
    "aten::std.correction": _moments,
    "aten::linalg_vector_norm": _norm,
    "aten::amax": _extremum,
    "aten::amin": _extremum,
    "aten::max": _extremum,
    "aten::min": _extremum,
    "aten::max.dim": _extremum_with_index,
    "aten::min.dim": _extremum_with_index,
    "aten::argmax": _extremum_with_index,
    "aten::argmin": _extremum_with_index,
    "aten::aminmax": _both_extrema,
    "aten::all": _truth,
    "aten::all.dim": _truth,
    "aten::all.dims": _truth,
    "aten::any": _truth,
    "aten::any.dims": _truth,
    "aten::any.dim": _truth,
    "aten::count_nonzero": _count_nonzero,
    "aten::count_nonzero.dim_IntList": _count_nonzero,
    "aten::logsumexp": _log_sum_exp,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::index.Tensor": _index,
    "aten::index_put": _index_put,
    "aten::index_put_": _index_put,
    "aten::_index_put_impl_": _index_put,
    "aten::cumsum": _cumulative_sum,
    "aten::sort": _sort,
    "aten::sort.stable": _sort,
    "aten::bincount": _bincount,
    "aten::mm": _product,
    "aten::addmm": _product,
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::native_dropout": _dropout,
    "aten::_foreach_norm.Scalar": _foreach_norm,
    "aten::_foreach_max": _foreach_max,
}


@by_operator
def rule_of(func: Any) -> Rule | None:
    rule = _RULES.get(func.name())
    return None if rule is None else lambda target, args: resolve(rule(target, args))


def all_arguments(
    func: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[object, ...]:
    """Return all arguments in the operator's order, including keyword arguments and defaults."""
    return tuple(_fill(func, args, kwargs))


def _fill(func: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[object]:
    for number, argument in enumerate(func._schema.arguments):
        yield (
            args[number]
            if number < len(args)
            else kwargs.get(argument.name, argument.default_value)
        )


def temporaries_by_shape(target: CudaTarget, op: str, arguments: Sequence[object]) -> list[int]:
    """Return the bytes of each temporary that operator `op` allocates, in order.

    arguments: tensors as (shape, dtype), or as (shape, dtype, stride, offset) if their elements are
        not contiguous from the beginning of their storage.
    """
    steps = _RULES[op](target, [_from_shape(value) for value in arguments])
    return [step for step in steps if isinstance(step, int)]


def _from_shape(value: object) -> object:
    if (
        not isinstance(value, tuple)
        or len(value) not in (2, 4)
        or not isinstance(value[1], torch.dtype)
    ):
        return [_from_shape(each) for each in value] if isinstance(value, tuple) else value
    made = torch.empty(0, dtype=value[1], device="meta")
    if len(value) == 2:
        return made.new_empty(value[0])
    size = (
        value[3]
        + 1
        + sum((length - 1) * step for length, step in zip(value[0], value[2], strict=True))
    )
    return made.new_empty(max(size, 0)).as_strided(value[0], value[2], value[3])
