"""Reproduce PyTorch's CUDA caching allocator without a GPU.

It turns allocations and frees into reserved memory, peaks and out-of-memory errors.

`CachingAllocator` behaves as c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.14.1 does for one
device, without CUDA graphs and private pools. Recordings of that allocator in
tests/golden/allocator are reproduced event by event. Its rules:
 1. A request is rounded up to 512 bytes, or to a fraction of a power of two where the configuration
    says so.
 2. Requests up to 1 MiB come from the small pool, in segments of 2 MiB. Larger ones come from the
    large pool: below 10 MiB in segments of 20 MiB, above in a segment of their own, rounded up to
    2 MiB.
 3. The remainder of a block is split off from 512 bytes on (small pool), or above 1 MiB (large
    pool).
 4. Each stream takes its smallest free block that fits; among equal ones, the lowest address.
 5. Blocks of `max_split_size` or more ("oversize") are not split: small requests do not take them,
    large requests take them only when they nearly fit.
 6. When no block fits: collect garbage and ask the driver; release oversize blocks and ask again;
    release the whole cache and ask again; fail.
 7. A memory fraction limits how much may be reserved.
 8. Garbage collection releases the cached segments that were unused for the longest time.
 9. With expandable segments, each pool and stream has one range of addresses, mapped page by page.
10. A block that a second stream uses stays active after its free, until the next allocation.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Literal

from fitune.allocator.config import NUM_INTERVALS, AllocatorConfig, parse_allocator_config
from fitune.errors import UsageError
from fitune.units import GIB, KIB, MIB

MIN_BLOCK_BYTES = 512
#: The largest request of the small pool. The large pool splits a block if more than this remains.
SMALL_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
#: From this size on, a request gets a segment of its own
MIN_LARGE_ALLOCATION_BYTES = 10 * MIB
#: Segments for one request are rounded up to a multiple of this
ROUND_LARGE_BYTES = 2 * MIB
FIRST_ADDRESS = 0x7F0000000000

State = Literal["allocated", "pending", "inactive", "unmapped"]

# A free block is one integer, size << 64 | address, in a sorted list: one bisection finds the best
# fit.
_ADDRESS_BITS = 64
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1
#: Size of an expandable segment's address range when the card has no limit
_UNLIMITED_ADDRESS_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a segment."""

    address: int
    num_bytes: int
    state: State
    #: 0 unless the block is allocated or pending (freed, but still used by another stream)
    requested_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory got from the driver in one piece, or one mapped range of an expandable segment."""

    address: int
    num_bytes: int
    stream: int
    is_small: bool
    is_expandable: bool
    blocks: tuple[Block, ...]


@dataclass(slots=True)
class DriverCalls:
    """Counts of calls to the CUDA driver; a failed call counts in both numbers."""

    cuda_malloc: int = 0
    cuda_malloc_failed: int = 0
    cuda_free: int = 0
    mem_create: int = 0
    mem_create_failed: int = 0
    mem_release: int = 0
    mem_map: int = 0
    mem_unmap: int = 0


class OutOfDeviceMemoryError(Exception):
    """Raised when nothing fits and nothing is left to release; its text is PyTorch's own.

    requested_bytes: the size of the request.
    segment_bytes: the size that the driver refused.
    allocated_bytes, reserved_bytes: of the allocator, after the cache was emptied.
    free_bytes: of the card.
    """

    def __init__(
        self,
        requested_bytes: int,
        *,
        segment_bytes: int,
        allocated_bytes: int,
        reserved_bytes: int,
        free_bytes: int,
        total_bytes: int,
        limit_bytes: int | None,
        is_expandable: bool,
    ) -> None:
        self.requested_bytes = requested_bytes
        self.segment_bytes = segment_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.free_bytes = free_bytes
        allowed = "" if limit_bytes is None else f"{_format_size(limit_bytes)} allowed; "
        hint = (
            " If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
            "documentation for Memory Management  "
            "(https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
        )
        super().__init__(
            f"CUDA out of memory. Tried to allocate {_format_size(segment_bytes)}. GPU 0 has a "
            f"total capacity of {_format_size(total_bytes)} of which {_format_size(free_bytes)} is "
            "free. Including non-PyTorch memory, this process has "
            f"{_format_size(total_bytes - free_bytes)} memory in use. {allowed}Of the allocated "
            f"memory {_format_size(allocated_bytes)} is allocated by PyTorch, and "
            f"{_format_size(reserved_bytes - allocated_bytes)} is reserved by PyTorch but "
            "unallocated." + ("" if is_expandable else hint)
        )


def _format_size(num_bytes: int) -> str:
    if num_bytes <= KIB:
        return f"{num_bytes} bytes"
    unit, name = next(
        (u, n)
        for u, n in ((KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB"))
        if num_bytes <= KIB * u or u == GIB
    )
    return f"{num_bytes / unit:.2f} {name}"


class _Node:
    """A block of memory, linked with its neighbours in the same segment."""

    __slots__ = (
        "address",
        "age_base",
        "next",
        "num_bytes",
        "pool",
        "previous",
        "range",
        "requested",
        "state",
        "uses",
    )

    def __init__(self, address: int, num_bytes: int, pool: "_StreamPool", state: State) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.pool = pool
        self.state: State = state
        self.requested = 0
        #: the pool's `num_searches` when the block became free
        self.age_base = 0
        self.previous: _Node | None = None
        self.next: _Node | None = None
        self.range: _AddressRange | None = None
        #: streams other than the pool's that use the block
        self.uses: set[int] | None = None

    @property
    def is_split(self) -> bool:
        return self.previous is not None or self.next is not None

    @property
    def num_expandable_bytes(self) -> int:
        """Return the block's size together with the unmapped addresses after it."""
        following = self.next
        return self.num_bytes + (
            following.num_bytes if following and following.state == "unmapped" else 0
        )


@dataclass(slots=True, eq=False)
class _Pool:
    """The small or the large blocks of all streams."""

    is_small: bool
    #: the page size of expandable segments
    page_bytes: int
    #: searches for a free block, counted while garbage collection is on
    num_searches: int = 0
    allocated: int = 0
    reserved: int = 0
    streams: dict[int, "_StreamPool"] = field(default_factory=dict)

    def of_stream(self, stream: int) -> "_StreamPool":
        return self.streams.setdefault(stream, _StreamPool(self, stream))


@dataclass(slots=True, eq=False)
class _StreamPool:
    """The free blocks of one stream."""

    pool: _Pool
    stream: int
    #: sorted keys of the free blocks, size << 64 | address
    free: list[int] = field(default_factory=list)
    #: sorted addresses of the unmapped ranges
    unmapped: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _AddressRange:
    """The addresses reserved for one expandable segment."""

    address: int
    page_bytes: int

    def page_below(self, address: int) -> int:
        return address - (address - self.address) % self.page_bytes

    def page_above(self, address: int) -> int:
        return address + -(address - self.address) % self.page_bytes


class CachingAllocator:
    """The caching allocator of one process on one card.

    config: the value of PYTORCH_ALLOC_CONF.
    total_bytes: the card's memory as the driver reports it. With None there is no limit: nothing is
        ever released and no fraction applies.
    used_by_others_bytes: held by the CUDA context and by other processes.
    memory_fraction: as in set_per_process_memory_fraction; replaces the configuration's.

    Raises UsageError for a configuration or a fraction that cannot be used.
    """

    def __init__(
        self,
        config: str | AllocatorConfig = "",
        *,
        total_bytes: int | None = None,
        used_by_others_bytes: int = 0,
        memory_fraction: float | None = None,
    ) -> None:
        self.config = parse_allocator_config(config) if isinstance(config, str) else config
        self.total_bytes = total_bytes
        fraction = self.config.memory_fraction if memory_fraction is None else memory_fraction
        if not 0 <= fraction <= 1:
            raise UsageError(f"the memory fraction is {fraction:g}, but must be from 0 to 1")
        self.limit_bytes: int | None = None
        if total_bytes is not None and fraction < 1:
            # Rounded, as a recording says "44.18 MiB allowed" for 0.95 of 46.5 MiB: truncated, that
            # would be 44.17.
            self.limit_bytes = int(fraction * total_bytes + 0.5)
        self.driver_calls = DriverCalls()
        self._used_by_others = used_by_others_bytes
        self._next_address = FIRST_ADDRESS
        self._collects_garbage = (
            self.limit_bytes is not None and self.config.garbage_collection_threshold > 0
        )
        self._rounds_by_division = any(self.config.roundup_divisions)
        self._small = _Pool(is_small=True, page_bytes=SMALL_SEGMENT_BYTES)
        self._large = _Pool(is_small=False, page_bytes=self.config.large_segment_bytes)
        #: all blocks by address, unmapped ranges included
        self._nodes: dict[int, _Node] = {}
        self._pending: list[_Node] = []

        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.active_bytes = self.peak_active_bytes = 0
        self.requested_bytes = self.peak_requested_bytes = 0
        self.num_allocations = 0
        self.num_segments = self.peak_num_segments = 0
        self.num_inactive_split = 0
        self.inactive_split_bytes = self.peak_inactive_split_bytes = 0
        self.num_alloc_retries = self.num_ooms = 0
        self.num_device_alloc = self.num_device_free = self.num_sync_all_streams = 0
        self.num_oversize_allocations = self.num_oversize_segments = 0

    @property
    def free_bytes(self) -> int | None:
        """Return the card's free memory as the driver sees it; None without a limit."""
        if self.total_bytes is None:
            return None
        return self.total_bytes - self._used_by_others - self.reserved_bytes

    def allocate(self, num_bytes: int, stream: int = 0) -> int:
        """Allocate a block of at least `num_bytes` and return its address; 0 for no bytes.

        Raises OutOfDeviceMemoryError; the allocator can still be used after that.
        """
        if num_bytes == 0:
            return 0
        if self._pending:
            self._complete_pending()
        size = self._round(num_bytes)
        pool = self._small if size <= SMALL_BYTES else self._large
        stream_pool = pool.streams.get(stream) or pool.of_stream(stream)
        node = self._take_free(stream_pool, size) or self._take_new(stream_pool, size, num_bytes)

        remaining = node.num_bytes - size
        expandable = self.config.expandable_segments
        if pool.is_small or expandable:
            splits = remaining >= MIN_BLOCK_BYTES
        else:
            splits = remaining > SMALL_BYTES and not self._is_oversize(size)
        if splits:
            node = self._split(node, size)
        elif node.is_split and not expandable:
            self.inactive_split_bytes -= node.num_bytes
            self.num_inactive_split -= 1
        node.state = "allocated"
        node.requested = num_bytes

        size = node.num_bytes
        pool.allocated += size
        self.num_allocations += 1
        self.allocated_bytes += size
        self.active_bytes += size
        self.requested_bytes += num_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if self.active_bytes > self.peak_active_bytes:
            self.peak_active_bytes = self.active_bytes
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes
        self.num_oversize_allocations += self._is_oversize(size)
        return node.address

    def free(self, address: int) -> None:
        """Free a block that `allocate` returned; it stays reserved. Address 0 is ignored."""
        if address == 0:
            return
        node = self._nodes[address]
        assert node.state == "allocated", f"free of {address:#x}, which is {node.state}"
        self.num_allocations -= 1
        self.allocated_bytes -= node.num_bytes
        node.pool.pool.allocated -= node.num_bytes
        self.num_oversize_allocations -= self._is_oversize(node.num_bytes)
        if node.uses:
            node.state = "pending"
            self._pending.append(node)
        else:
            self._cache(node)

    def record_stream(self, address: int, stream: int) -> None:
        """Note that `stream` uses the block too, as torch.Tensor.record_stream does."""
        node = self._nodes[address]
        if stream != node.pool.stream:
            node.uses = {stream} | (node.uses or set())

    def empty_cache(self) -> None:
        """Release all segments without an allocated block.

        Of expandable segments, every page without an allocated block is released.
        """
        self.num_sync_all_streams += 1
        self._complete_pending()
        for pool in (self._large, self._small):
            for node in self._free_nodes(pool):
                if node.range is not None:
                    self._unmap(node)
                elif not node.is_split:
                    self._release(node)

    def reset_peaks(self) -> None:
        """Set the peaks to the current values, as torch.cuda.reset_peak_memory_stats does."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes
        self.peak_active_bytes = self.active_bytes
        self.peak_requested_bytes = self.requested_bytes
        self.peak_num_segments = self.num_segments
        self.peak_inactive_split_bytes = self.inactive_split_bytes

    def memory_stats(self) -> dict[str, int]:
        """Return the counters under the names that torch.cuda.memory_stats gives them."""
        stats = {
            "allocation.all.current": self.num_allocations,
            "segment.all.current": self.num_segments,
            "segment.all.peak": self.peak_num_segments,
            "inactive_split.all.current": self.num_inactive_split,
            "num_alloc_retries": self.num_alloc_retries,
            "num_ooms": self.num_ooms,
            "num_device_alloc": self.num_device_alloc,
            "num_device_free": self.num_device_free,
            "num_sync_all_streams": self.num_sync_all_streams,
            "oversize_allocations.current": self.num_oversize_allocations,
            "oversize_segments.current": self.num_oversize_segments,
        }
        for name in (
            "allocated_bytes",
            "reserved_bytes",
            "active_bytes",
            "requested_bytes",
            "inactive_split_bytes",
        ):
            stats[f"{name}.all.current"] = getattr(self, name)
            stats[f"{name}.all.peak"] = getattr(self, f"peak_{name}")
        for pool, name in ((self._small, "small_pool"), (self._large, "large_pool")):
            stats[f"allocated_bytes.{name}.current"] = pool.allocated
            stats[f"reserved_bytes.{name}.current"] = pool.reserved
        return stats

    def snapshot(self) -> tuple[Segment, ...]:
        """Return all segments with their blocks, sorted by address."""
        heads = (
            node
            for _, node in sorted(self._nodes.items())
            if node.state != "unmapped"
            and (node.previous is None or node.previous.state == "unmapped")
        )
        return tuple(self._segment(head) for head in heads)

    # Rule 1: rounding
    def _round(self, num_bytes: int) -> int:
        if num_bytes < MIN_BLOCK_BYTES:
            return MIN_BLOCK_BYTES
        if self._rounds_by_division:
            interval = min(max(num_bytes.bit_length() - MIB.bit_length(), 0), NUM_INTERVALS - 1)
            divisions = self.config.roundup_divisions[interval]
            if divisions > 1 and num_bytes > MIN_BLOCK_BYTES * divisions:
                step = (1 << (num_bytes.bit_length() - 1)) // divisions
                return -(-num_bytes // step) * step
        return (num_bytes + MIN_BLOCK_BYTES - 1) // MIN_BLOCK_BYTES * MIN_BLOCK_BYTES

    # Rule 2: segment sizes
    def _segment_bytes(self, size: int) -> int:
        if size <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if size < MIN_LARGE_ALLOCATION_BYTES:
            return self.config.large_segment_bytes
        return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES

    # Rules 3 to 5: splitting, best fit, oversize blocks
    def _is_oversize(self, size: int) -> bool:
        limit = self.config.max_split_bytes
        return limit is not None and size >= limit

    def _take_free(self, stream_pool: _StreamPool, size: int) -> _Node | None:
        """Remove the best free block from the stream's list and return it."""
        if self._collects_garbage:
            stream_pool.pool.num_searches += 1
        free = stream_pool.free
        i = bisect_left(free, size << _ADDRESS_BITS)
        if i == len(free):
            return None
        node = self._nodes[free[i] & _ADDRESS_MASK]
        if self.config.expandable_segments:
            # PyTorch compares blocks by the size that they can grow to.
            while i + 1 < len(free):
                candidate = self._nodes[free[i + 1] & _ADDRESS_MASK]
                if candidate.num_expandable_bytes >= node.num_expandable_bytes:
                    break
                node, i = candidate, i + 1
        if self.config.max_split_bytes is not None:
            if not self._is_oversize(size):
                if self._is_oversize(node.num_bytes):
                    return None
            elif node.num_bytes >= size + self.config.max_non_split_rounding_bytes:
                return None
        del free[i]
        return node

    def _split(self, node: _Node, size: int) -> _Node:
        """Split `size` bytes off the front of a taken block; the rest becomes a free block."""
        was_split = node.is_split
        front = _Node(node.address, size, node.pool, "inactive")
        front.range = node.range
        front.previous, front.next = node.previous, node
        if node.previous is not None:
            node.previous.next = front
        node.previous = front
        node.address += size
        node.num_bytes -= size
        self._nodes[front.address] = front
        self._nodes[node.address] = node
        self._insert_free(node)
        if node.range is None:
            if was_split:
                self.inactive_split_bytes -= size
            else:
                self.num_inactive_split += 1
                self._add_inactive_split_bytes(node.num_bytes)
        return front

    def _insert_free(self, node: _Node) -> None:
        node.age_base = node.pool.pool.num_searches
        insort(node.pool.free, node.num_bytes << _ADDRESS_BITS | node.address)

    def _remove_free(self, node: _Node) -> None:
        free = node.pool.free
        del free[bisect_left(free, node.num_bytes << _ADDRESS_BITS | node.address)]

    def _cache(self, node: _Node) -> None:
        """Mark a block free, merge it with its free neighbours and list it."""
        self.active_bytes -= node.num_bytes
        self.requested_bytes -= node.requested
        node.requested = 0
        node.state = "inactive"
        before = self._merge(node, node.previous)
        after = self._merge(node, node.next)
        self._insert_free(node)
        if node.range is None:
            self.num_inactive_split += node.is_split - (before > 0) - (after > 0)
            self._add_inactive_split_bytes(
                (node.num_bytes if node.is_split else 0) - before - after
            )

    def _merge(self, node: _Node, other: _Node | None) -> int:
        """Merge a free or unmapped block with a neighbour of the same state.

        Returns the number of bytes gained.
        """
        if other is None or other.state != node.state:
            return 0
        if other.state == "inactive":
            self._remove_free(other)
        else:
            other.pool.unmapped.remove(other.address)
        del self._nodes[other.address]
        if node.previous is other:
            self._nodes.pop(node.address, None)
            node.address = other.address
            node.previous = other.previous
            if node.previous is not None:
                node.previous.next = node
        else:
            node.next = other.next
            if node.next is not None:
                node.next.previous = node
        self._nodes[node.address] = node
        node.num_bytes += other.num_bytes
        return other.num_bytes

    def _add_inactive_split_bytes(self, num_bytes: int) -> None:
        self.inactive_split_bytes += num_bytes
        if self.inactive_split_bytes > self.peak_inactive_split_bytes:
            self.peak_inactive_split_bytes = self.inactive_split_bytes

    # Rules 6 and 7: asking the driver
    def _take_new(self, stream_pool: _StreamPool, size: int, requested: int) -> _Node:
        if self._collects_garbage and not self.config.expandable_segments:
            self._collect_garbage()
        node = self._reserve(stream_pool, size)
        if node is None and self._release_oversize(stream_pool, size):
            node = self._reserve(stream_pool, size)
        if node is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            node = self._reserve(stream_pool, size)
        if node is None:
            self.num_ooms += 1
            raise OutOfDeviceMemoryError(
                requested,
                segment_bytes=self._segment_bytes(size),
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.reserved_bytes,
                free_bytes=self.free_bytes or 0,
                total_bytes=self.total_bytes or 0,
                limit_bytes=self.limit_bytes,
                is_expandable=self.config.expandable_segments,
            )
        return node

    def _reserve(self, stream_pool: _StreamPool, size: int) -> _Node | None:
        """Return a new segment, or map more pages; None when the limit or the driver refuses."""
        num_bytes = self._segment_bytes(size)
        if self.limit_bytes is not None and self.reserved_bytes + num_bytes > self.limit_bytes:
            return None
        if self.config.expandable_segments:
            return self._expand(stream_pool, size)
        self.driver_calls.cuda_malloc += 1
        if self.free_bytes is not None and num_bytes > self.free_bytes:
            self.driver_calls.cuda_malloc_failed += 1
            return None
        node = _Node(self._new_addresses(num_bytes), num_bytes, stream_pool, "inactive")
        self._nodes[node.address] = node
        self.num_segments += 1
        self.peak_num_segments = max(self.peak_num_segments, self.num_segments)
        self.num_oversize_segments += self._is_oversize(num_bytes)
        self._add_reserved(stream_pool.pool, num_bytes)
        return node

    def _new_addresses(self, num_bytes: int) -> int:
        """Return the start of unused addresses.

        Addresses ascend and are never reused, so the lowest address belongs to the oldest segment.
        """
        address = self._next_address
        self._next_address += -(-num_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        return address

    def _add_reserved(self, pool: _Pool, num_bytes: int) -> None:
        self.num_device_alloc += 1
        pool.reserved += num_bytes
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _release(self, node: _Node) -> None:
        """Return a whole free segment to the driver."""
        self._remove_free(node)
        del self._nodes[node.address]
        self.driver_calls.cuda_free += 1
        self.num_segments -= 1
        self.num_oversize_segments -= self._is_oversize(node.num_bytes)
        self._subtract_reserved(node.pool.pool, node.num_bytes)

    def _subtract_reserved(self, pool: _Pool, num_bytes: int) -> None:
        self.num_device_free += 1
        pool.reserved -= num_bytes
        self.reserved_bytes -= num_bytes

    def _release_oversize(self, stream_pool: _StreamPool, size: int) -> bool:
        """Release oversize blocks so that `size` bytes may fit; return whether enough was released.

        Releases one block that is large enough, or else blocks from the largest down. What was
        released stays released even if it is not enough.
        """
        limit = self.config.max_split_bytes
        if limit is None or self.config.expandable_segments:
            return False
        needed = max(size, limit)
        i = bisect_left(stream_pool.free, needed << _ADDRESS_BITS)
        if i < len(stream_pool.free):
            self._release(self._nodes[stream_pool.free[i] & _ADDRESS_MASK])
            return True
        released = 0
        while (
            released < needed
            and stream_pool.free
            and self._is_oversize(stream_pool.free[-1] >> _ADDRESS_BITS)
        ):
            released += stream_pool.free[-1] >> _ADDRESS_BITS
            self._release(self._nodes[stream_pool.free[-1] & _ADDRESS_MASK])
        return released >= needed

    # Rule 8: garbage collection
    def _collect_garbage(self) -> None:
        assert self.limit_bytes is not None
        threshold = int(self.config.garbage_collection_threshold * self.limit_bytes)
        to_reclaim = self.reserved_bytes - threshold
        whole = [node for node in self._free_nodes(self._large) if not node.is_split]
        while to_reclaim > 0 and whole:
            # A block's age is the number of searches since it became free, so the oldest have the
            # lowest `age_base`.
            mean_base = sum(node.age_base for node in whole) / len(whole)
            for node in whole:
                if node.age_base <= mean_base:
                    to_reclaim -= node.num_bytes
                    self._release(node)
            whole = [node for node in whole if node.age_base > mean_base]

    def _free_nodes(self, pool: _Pool) -> list[_Node]:
        return [
            self._nodes[key & _ADDRESS_MASK]
            for stream in sorted(pool.streams)
            for key in pool.streams[stream].free
        ]

    # Rule 9: expandable segments
    def _expand(self, stream_pool: _StreamPool, size: int) -> _Node | None:
        """Return a free block of at least `size`, at the lowest address where it can be mapped.

        Returns None when the driver has no page left; pages that were mapped until then stay
        mapped.
        """
        node = self._find_address(stream_pool, size)
        if node.state == "unmapped" and not self._map(node, min(node.num_bytes, size)):
            return None
        while node.num_bytes < size:
            following = node.next
            assert following is not None
            if not self._map(following, min(size - node.num_bytes, following.num_bytes)):
                return None
            node = following  # `_map` has merged the block before into it
        self._remove_free(node)
        return node

    def _find_address(self, stream_pool: _StreamPool, size: int) -> _Node:
        """Return the first block from which `size` bytes can be mapped.

        Reserves a new range of addresses if there is none.
        """
        for address in stream_pool.unmapped:
            node = self._nodes[address]
            if node.previous is not None and node.previous.state == "inactive":
                node = node.previous
            num_available, following = node.num_bytes, node.next
            while (
                num_available < size
                and following is not None
                and following.state in ("inactive", "unmapped")
            ):
                num_available += following.num_bytes
                following = following.next
            if num_available >= size:
                return node
        page = stream_pool.pool.page_bytes
        total = _UNLIMITED_ADDRESS_BYTES if self.total_bytes is None else self.total_bytes
        num_bytes = -(-(total + total // 8) // page) * page
        node = _Node(self._new_addresses(num_bytes), num_bytes, stream_pool, "unmapped")
        node.range = _AddressRange(node.address, page)
        self._nodes[node.address] = node
        insort(stream_pool.unmapped, node.address)
        return node

    def _map(self, node: _Node, num_bytes: int) -> bool:
        """Back the first `num_bytes` of an unmapped block with pages.

        Returns False, with nothing mapped, if the driver has too few pages.
        """
        assert node.range is not None
        page = node.range.page_bytes
        num_bytes = -(-num_bytes // page) * page
        num_pages = num_bytes // page
        num_possible = (
            num_pages if self.free_bytes is None else min(num_pages, self.free_bytes // page)
        )
        self.driver_calls.mem_create += num_possible
        if num_possible < num_pages:
            self.driver_calls.mem_create += 1
            self.driver_calls.mem_create_failed += 1
            self.driver_calls.mem_release += num_possible
            return False
        self.driver_calls.mem_map += num_pages
        node.pool.unmapped.remove(node.address)
        if num_bytes < node.num_bytes:
            insort(node.pool.unmapped, self._cut(node, num_bytes).address)
        node.state = "inactive"
        self._merge(node, node.previous)
        self._merge(node, node.next)
        self._insert_free(node)
        self._add_reserved(node.pool.pool, num_bytes)
        return True

    def _unmap(self, node: _Node) -> None:
        """Release the pages that lie wholly in a free block; drop a range without any page left."""
        assert node.range is not None
        begin = node.range.page_above(node.address)
        end = node.range.page_below(node.address + node.num_bytes)
        if begin >= end:
            return
        num_pages = (end - begin) // node.range.page_bytes
        self._remove_free(node)
        if begin > node.address:
            front, node = node, self._cut(node, begin - node.address)
            self._insert_free(front)
        if end < node.address + node.num_bytes:
            self._insert_free(self._cut(node, end - node.address))
        node.state = "unmapped"
        self._merge(node, node.previous)
        self._merge(node, node.next)
        self.driver_calls.mem_unmap += num_pages
        self.driver_calls.mem_release += num_pages
        self._subtract_reserved(node.pool.pool, end - begin)
        if node.is_split:
            insort(node.pool.unmapped, node.address)
        else:
            del self._nodes[node.address]

    def _cut(self, node: _Node, size: int) -> _Node:
        """Leave `size` bytes in the block, and return the rest as a new block.

        The new block is in no list of free or unmapped blocks yet.
        """
        rest = _Node(node.address + size, node.num_bytes - size, node.pool, node.state)
        rest.range = node.range
        rest.previous, rest.next = node, node.next
        if node.next is not None:
            node.next.previous = rest
        node.next = rest
        node.num_bytes = size
        self._nodes[rest.address] = rest
        return rest

    # Rule 10: blocks that other streams use
    def _complete_pending(self) -> None:
        for node in self._pending:
            node.uses = None
            self._cache(node)
        self._pending.clear()

    def _segment(self, head: _Node) -> Segment:
        blocks = []
        node: _Node | None = head
        while node is not None and node.state != "unmapped":
            blocks.append(Block(node.address, node.num_bytes, node.state, node.requested))
            node = node.next
        return Segment(
            address=head.address,
            num_bytes=sum(block.num_bytes for block in blocks),
            stream=head.pool.stream,
            is_small=head.pool.pool.is_small,
            is_expandable=head.range is not None,
            blocks=tuple(blocks),
        )
