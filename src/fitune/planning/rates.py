"""Measures the highest rates of this machine's CPU, in a second or two, and caches them.

The cached rates hold for one number of threads. Other work of the machine at the moment must not
lower the rates, or a plan made on a busy machine would stay wrong for good:

- each probe is short and repeated, and the best time counts;
- where there are several threads, which wait for each other, the rates of one thread are measured
  too, by its processor time, and the higher rate counts;
- rates that were measured while this process got less than one core are measured again by the next
  plan, and the higher ones are kept.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache

from fitune.machine.environment import c_allocator
from fitune.planning.cache import cached, read_cached, write_cached
from fitune.planning.cost import Ceilings

# The fractions of the probes' rates that a training step reaches. A step's matrix products and
# attention have other shapes, its launches pass through the model's Python, and its operators read
# tensors that are not in a warm cache. The fractions come from torch.profiler's seconds for each
# operator in four settings of the first model of benchmarks/plan.py, compared with probes in the
# same process. The resulting order was then compared with the measured order of 72 settings of
# three models; after that the fraction of exponentials was changed from 0.68 to 1.
MATMUL_SHARE, ATTENTION_SHARE, LAUNCH_SHARE = 0.75, 0.84, 0.175
SMALL_SHARE, LARGE_SHARE, EXPONENTIAL_SHARE, MAPPED_SHARE = 0.2, 0.5, 1.0, 0.72
_SMALL_ELEMENTS, _EXPONENTIAL_ELEMENTS = 2**16, 2**18
_LARGE_ELEMENTS, _MAPPED_ELEMENTS = 2**22, 2**23 + 2**20
#: elements of the largest float32 block that glibc allocates on its heap once such a block was
#: freed: 32 MiB with the allocator's own header
_MOST_ON_HEAP = 2**23 - 2**12
_REPEATS = 15
_NUM_LAUNCHES = 100
#: cores of processor time in a second of the probes, below which other programs had held them up
_IDLE_SHARE = 0.9


@cache
def cpu_ceilings() -> Ceilings:
    """Return the cached rates of this CPU, or measure them."""
    key = [*_processor(), c_allocator()]
    found = read_cached("ceilings", key)
    if found is None or found.get("is_busy", True):
        started, used = time.perf_counter(), time.process_time()
        measured = _measure_threads()
        share = (time.process_time() - used) / (time.perf_counter() - started)
        if found is not None:
            measured = _fastest(measured, Ceilings(**found["rates"]))
        found = {"rates": asdict(measured), "is_busy": share < _IDLE_SHARE}
        write_cached("ceilings", key, found)
    return Ceilings(**found["rates"])


def _measure_threads() -> Ceilings:
    """Measure the rates of all threads and of one alone, and return the higher ones."""
    import torch

    num_threads = torch.get_num_threads()
    rates = _measure()
    if num_threads > 1:
        torch.set_num_threads(1)
        try:
            rates = _fastest(rates, _measure())
        finally:
            torch.set_num_threads(num_threads)
    return rates


def _fastest(one: Ceilings, other: Ceilings) -> Ceilings:
    """Return the higher of each rate."""

    def highest(rates: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
        return {dtype: max(rate, others[dtype]) for dtype, rate in rates.items()}

    matmul = highest(one.matmul_flops_per_second, other.matmul_flops_per_second)
    return replace(
        one,
        matmul_flops_per_second=matmul,
        attention_flops_per_second=highest(
            one.attention_flops_per_second, other.attention_flops_per_second
        ),
        bandwidths=tuple(
            (size, max(rate, rate_of_other))
            for (size, rate), (_, rate_of_other) in zip(
                one.bandwidths, other.bandwidths, strict=True
            )
        ),
        exponential_bandwidth=max(one.exponential_bandwidth or 0, other.exponential_bandwidth or 0),
        mapped_bandwidth=max(one.mapped_bandwidth or 0, other.mapped_bandwidth or 0),
        launch_seconds=min(one.launch_seconds, other.launch_seconds),
        origin=_origin(matmul["float32"]),
    )


def _origin(matmul_flops_per_second: float) -> str:
    rate = matmul_flops_per_second / MATMUL_SHARE / 1e9
    return f"measured on this CPU: {rate:.0f} GFLOP/s in matrix products"


@cache
def launch_seconds_here() -> float:
    """Return the cached seconds of an eager operator with its part of autograd, or measure them.

    They are those of this machine's processor, which launches for a CPU and for a card alike. What
    NVIDIA's driver adds to a launch is not in them. A step of fitune on a rehearsed card took the
    processor 0.9 (Qwen2.5-0.5B with LoRA) to 2.3 times as long for each operator (minimind2-small,
    whose steps of 14 ms have other costs too).
    """
    return float(cached("launches", _processor(), _launch_seconds))


def _launch_seconds() -> float:
    return _best(_launches) / (3 * _NUM_LAUNCHES) / LAUNCH_SHARE


def _processor() -> list[object]:
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return [platform.processor(), platform.node(), threads]


def _measure() -> Ceilings:
    import torch

    # glibc raises its threshold to the size of the largest freed block, and a training process
    # has freed such a block early
    torch.empty(_MOST_ON_HEAP)
    left, right = torch.randn(256, 512), torch.randn(512, 512)
    matmul = 2 * 256 * 512 * 512 / _best(lambda: left @ right)
    small, large, mapped = map(_bandwidth, (_SMALL_ELEMENTS, _LARGE_ELEMENTS, _MAPPED_ELEMENTS))
    return Ceilings(
        matmul_flops_per_second={"float32": MATMUL_SHARE * matmul},
        attention_flops_per_second={"float32": ATTENTION_SHARE * _attention_rate()},
        bandwidths=((1e6, SMALL_SHARE * small), (1e8, LARGE_SHARE * large)),
        exponential_bandwidth=EXPONENTIAL_SHARE * _exponential_bandwidth(),
        mapped_bandwidth=MAPPED_SHARE * mapped,
        launch_seconds=_launch_seconds(),
        asynchronous=False,
        origin=_origin(MATMUL_SHARE * matmul),
    )


def _bandwidth(num_elements: int) -> float:
    """Measure the bytes per second of an elementwise product: two reads and a write per element."""
    import torch

    values = torch.randn(num_elements)
    return 3 * 4 * num_elements / _best(lambda: values * values)


def _exponential_bandwidth() -> float:
    """Measure the bytes per second of SiLU, which reads and writes each element once."""
    import torch

    values = torch.randn(_EXPONENTIAL_ELEMENTS)
    return 2 * 4 * _EXPONENTIAL_ELEMENTS / _best(lambda: torch.nn.functional.silu(values))


def _attention_rate() -> float:
    """Measure the FLOP/s of attention, forward and backward.

    The FLOPs are counted as PyTorch counts them: heads x head_dim x tokens squared, times 4 in the
    forward and times 10 in the backward.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads, tokens, width = 4, 256, 64
    query = torch.randn(1, heads, tokens, width, requires_grad=True)

    def both_ways() -> None:
        scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    return 14 * heads * tokens**2 * width / _best(both_ways)


def _launches() -> None:
    """Run 100 forward operators, each with two operators in the backward."""
    import torch

    value = torch.ones(8, requires_grad=True)
    result = value
    for _ in range(_NUM_LAUNCHES):
        result = result * value
    result.sum().backward()


def _best(function: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls, after one that warms up.

    With a single thread the thread's CPU time counts, which excludes the time of other programs.
    """
    import torch

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    found = []
    for _ in range(_REPEATS):
        start = clock()
        function()
        found.append(clock() - start)
    return min(found)
