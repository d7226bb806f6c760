"""Compute the scratch memory of CUDA's reductions over dims, as PyTorch's launcher does.

native/cuda/Reduce.cuh (setReduceConfig, gpu_reduce_kernel) splits a long reduction over several
blocks. These leave partial results, and a semaphore for each output, in global memory. The number
of blocks follows from the shape, its layout and the card's size. As in native/TensorIterator.cpp,
the dims are sorted and merged first (reorder_dimensions, coalesce_dimensions), and an input that
spans more than 2 GiB is reduced in parts (with_32bit_indexing).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

#: The most threads in a block (mnt_wrapper)
_MOST_THREADS = 512
_WARP = 32
#: The most elements or bytes that can be indexed by 32 bits
_LONGEST = 2**31 - 1


class Card(NamedTuple):
    """The size of a card."""

    #: the number of streaming multiprocessors
    multiprocessors: int
    #: resident threads of one multiprocessor
    threads: int


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction of a strided input."""

    #: shape, stride and offset of the input, in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    #: the dims that are reduced
    dims: frozenset[int]
    #: bytes of an input element
    element_bytes: int
    #: bytes of what a thread accumulates (arg_t)
    partial_bytes: int
    #: bytes of an output element
    output_bytes: int


def scratch(reduction: Reduction, card: Card) -> list[tuple[int, ...]]:
    """Return the bytes of the scratch allocations of each part, one part after the other.

    A buffer that all parts share is listed first.
    """
    if prod(reduction.shape) == 0:
        return []
    whole = _Iteration.of(reduction)
    parts = list(_parts(whole))
    found = [sizes for part in parts if (sizes := _part_scratch(part, reduction, card))]
    # An output of 16 bits cannot hold the sums of parts, so these need a buffer of their own.
    if len(parts) > 1 and reduction.output_bytes < reduction.partial_bytes:
        return [(whole.num_outputs * reduction.partial_bytes,), *found]
    return found


@dataclass(frozen=True, slots=True)
class _Iteration:
    """The sorted and merged dims of a reduction, from the fastest to the slowest."""

    shape: tuple[int, ...]
    #: strides of the input, in elements
    inputs: tuple[int, ...]
    #: strides of the output, in elements; 0 for dims that are reduced
    outputs: tuple[int, ...]
    offset: int
    element_bytes: int
    output_bytes: int

    @classmethod
    def of(cls, reduction: Reduction) -> "_Iteration":
        shape, stride = reduction.shape, reduction.stride
        num_outputs, outputs = 1, [0] * len(shape)
        for dim in reversed(range(len(shape))):
            if dim not in reduction.dims:
                outputs[dim] = num_outputs
                num_outputs *= shape[dim]
        order = _order(shape, stride, outputs)
        merged: list[list[int]] = []
        for dim in order:
            size, read, written = shape[dim], stride[dim], outputs[dim]
            if merged and _can_merge(merged[-1], size, read, written):
                if merged[-1][0] == 1:
                    merged[-1][1:] = [read, written]
                merged[-1][0] *= size
            else:
                merged.append([size, read, written])
        columns = zip(*merged, strict=True) if merged else ((), (), ())
        sizes, reads, writes = (tuple(column) for column in columns)
        return cls(
            sizes, reads, writes, reduction.offset, reduction.element_bytes, reduction.output_bytes
        )

    @property
    def num_reduced(self) -> int:
        return sum(stride == 0 for stride in self.outputs)

    @property
    def num_outputs(self) -> int:
        return prod(size for size, stride in zip(self.shape, self.outputs, strict=True) if stride)

    def spans(self) -> Iterator[list[int]]:
        """Yield the bytes between first and last element along each dim, of output and of input."""
        for strides, element in (
            (self.outputs, self.output_bytes),
            (self.inputs, self.element_bytes),
        ):
            yield [
                (size - 1) * stride * element
                for size, stride in zip(self.shape, strides, strict=True)
            ]


def _order(shape: Sequence[int], stride: Sequence[int], outputs: Sequence[int]) -> list[int]:
    """Sort the dims: reduced ones first, then by stride.

    This is a stable insertion sort, as in TensorIterator: its comparison is not a total order, so
    another sort could give another result.
    """
    order = list(reversed(range(len(shape))))
    dims = list(zip(shape, outputs, stride, strict=True))
    for i in range(1, len(order)):
        later = i
        for earlier in range(i - 1, -1, -1):
            comparison = _should_swap(dims[order[earlier]], dims[order[later]])
            if comparison > 0:
                order[earlier], order[later] = order[later], order[earlier]
                later = earlier
            elif comparison < 0:
                break
    return order


def _should_swap(first: tuple[int, int, int], second: tuple[int, int, int]) -> int:
    """Compare two dims as TensorIterator does: 1 to swap them, -1 to leave them, 0 for unknown.

    A dim is its size, its stride in the output, 0 where it is reduced, and in the input.
    """
    if (first[1] == 0) != (second[1] == 0):
        return 1 if second[1] == 0 else -1
    for a, b in zip(first[1:], second[1:], strict=True):
        if a == 0 or b == 0:
            continue
        if a != b:
            return -1 if a < b else 1
        if first[0] > second[0]:
            return 1
    return 0


def _can_merge(before: Sequence[int], size: int, read: int, written: int) -> bool:
    if before[0] == 1 or size == 1:
        return True
    return before[0] * before[1] == read and before[0] * before[2] == written


def _parts(iteration: _Iteration) -> Iterator[_Iteration]:
    """Halve the dim that spans the most bytes until 32 bits can index each part."""
    spans = list(iteration.spans())
    if prod(iteration.shape) <= _LONGEST and all(sum(each) < _LONGEST for each in spans):
        yield iteration
        return
    widest = [max(each) for each in zip(*spans, strict=True)]
    dim = max(range(len(widest)), key=lambda i: (widest[i], i))
    half = iteration.shape[dim] // 2
    for start, size in ((0, half), (half, iteration.shape[dim] - half)):
        shape = (*iteration.shape[:dim], size, *iteration.shape[dim + 1 :])
        yield from _parts(
            replace(iteration, shape=shape, offset=iteration.offset + start * iteration.inputs[dim])
        )


def _part_scratch(part: _Iteration, reduction: Reduction, card: Card) -> tuple[int, ...]:
    num_outputs = part.num_outputs
    num_inputs = prod(part.shape) // num_outputs
    num_reduced = part.num_reduced
    is_row = (
        not part.shape
        or num_reduced == len(part.shape)
        or part.inputs[0] < part.inputs[num_reduced]
    )
    dim0, dim1 = (num_inputs, num_outputs) if is_row else (num_outputs, num_inputs)
    fastest = 1 if not part.shape else part.inputs[0 if is_row else num_reduced]
    output_vector = 1
    if fastest == 1:
        if is_row and dim0 >= 128 and num_reduced == 1:
            dim0 //= 4  # a thread reads 4 elements at once
        elif not is_row:
            output_vector = _output_vector(part, num_reduced)
            dim0 //= output_vector
    width, height = _block(dim0, dim1, _MOST_THREADS // output_vector)
    step_input, step_output = (width, 1) if is_row else (1, width)
    splits_warps = _ceil_div(num_inputs, step_input) >= min(height * 16, 256)
    if splits_warps:
        step_input *= height
    else:
        step_output *= height
    blocks = card.multiprocessors * (card.threads // (width * height))
    grid = _ceil_div(num_outputs // output_vector, step_output)
    values = _ceil_div(num_inputs, step_input)
    if not splits_warps or values < 256 or grid > blocks:
        return ()
    num_splits = max(_ceil_div(values, 256), min(_ceil_div(blocks, grid), _ceil_div(values, 16)))
    if num_splits <= 1:
        return ()
    partial = reduction.partial_bytes * num_outputs * num_splits
    if not is_row:
        partial *= width * output_vector
    return partial, 4 * grid


def _block(dim0: int, dim1: int, most: int) -> tuple[int, int]:
    first = _power_of_2(dim0) if dim0 < most else most
    second = _power_of_2(dim1) if dim1 < most else most
    width = min(first, _WARP)
    height = min(second, most // width)
    return min(first, most // height), height


def _output_vector(part: _Iteration, num_reduced: int) -> int:
    vector = 4
    steps = (stride for dim, stride in enumerate(part.inputs) if dim != num_reduced)
    for number in (part.offset, part.shape[num_reduced], *steps):
        while number % vector:
            vector //= 2
    return vector


def _power_of_2(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


def _ceil_div(number: int, step: int) -> int:
    return -(-number // step)
