"""What this machine's CPU does at most: measured once, in about a second, and remembered for the number of threads.

Each probe is short and repeated, and the best time counts: what else the machine does at the moment is no ceiling.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache

from fitune.machine.environment import c_allocator
from fitune.planning.cache import read_cached, write_cached
from fitune.planning.cost import Ceilings

MATMUL_SHARE, ATTENTION_SHARE, LAUNCH_SHARE = 0.75, 0.84, 0.175
SMALL_SHARE, LARGE_SHARE, EXPONENTIAL_SHARE, MAPPED_SHARE = 0.2, 0.5, 1.0, 0.72
"""Of what the probes reach, what a training step does: matrix products and attention of its shapes, launches through
the model's Python; operators on tensors that come from elsewhere than a warm cache. Read off torch.profiler's seconds
for each operator in four settings of the first model of benchmarks/plan.py, beside probes in the same process; the
order that this gives was then compared with the measured one of 72 settings of three models, for which exponentials
were moved from 0.68 to 1."""
_SMALL_ELEMENTS, _EXPONENTIAL_ELEMENTS, _LARGE_ELEMENTS, _MAPPED_ELEMENTS = 2**16, 2**18, 2**22, 2**23 + 2**20
_MOST_ON_HEAP = 2**23 - 2**12
"""Elements of the largest float32 block that glibc keeps on its heap once one was freed: 32 MiB with what is around."""
_REPEATS = 15
_NUM_LAUNCHES = 100


@cache
def cpu_ceilings() -> Ceilings:
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    key = [platform.processor(), platform.node(), threads, c_allocator()]
    found = read_cached("ceilings", key)
    if found is None:
        found = asdict(_measure())
        write_cached("ceilings", key, found)
    return Ceilings(**found)


def _measure() -> Ceilings:
    import torch

    torch.empty(_MOST_ON_HEAP)  # glibc's threshold follows the largest freed block; a training process has had it
    left, right = torch.randn(256, 512), torch.randn(512, 512)
    matmul = 2 * 256 * 512 * 512 / _best(lambda: left @ right)
    small, large, mapped = map(_bandwidth, (_SMALL_ELEMENTS, _LARGE_ELEMENTS, _MAPPED_ELEMENTS))
    return Ceilings(
        matmul_flops_per_second={"float32": MATMUL_SHARE * matmul},
        attention_flops_per_second={"float32": ATTENTION_SHARE * _attention_rate()},
        bandwidths=((1e6, SMALL_SHARE * small), (1e8, LARGE_SHARE * large)),
        exponential_bandwidth=EXPONENTIAL_SHARE * _exponential_bandwidth(),
        mapped_bandwidth=MAPPED_SHARE * mapped,
        launch_seconds=_best(_launches) / (3 * _NUM_LAUNCHES) / LAUNCH_SHARE,
        asynchronous=False,
        origin=f"measured on this CPU: {matmul / 1e9:.0f} GFLOP/s in matrix products",
    )


def _bandwidth(num_elements: int) -> float:
    """Of a product, of which two elements are read and one is written."""
    import torch

    values = torch.randn(num_elements)
    return 3 * 4 * num_elements / _best(lambda: values * values)


def _exponential_bandwidth() -> float:
    """An element is read and one is written."""
    import torch
    from torch.nn.functional import silu

    values = torch.randn(_EXPONENTIAL_ELEMENTS)
    return 2 * 4 * _EXPONENTIAL_ELEMENTS / _best(lambda: silu(values))


def _attention_rate() -> float:
    """Forward and backward, counted as PyTorch counts them: 4 and 10 times heads x head_dim x tokens squared."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads, tokens, width = 4, 256, 64
    query = torch.randn(1, heads, tokens, width, requires_grad=True)

    def both_ways() -> None:
        scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    return 14 * heads * tokens**2 * width / _best(both_ways)


def _launches() -> None:
    """A forward operator and two of the backward each."""
    import torch

    value = torch.ones(8, requires_grad=True)
    result = value
    for _ in range(_NUM_LAUNCHES):
        result = result * value
    result.sum().backward()


def _best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that warms up; of a single thread only while it ran."""
    import torch

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    found = []
    for _ in range(_REPEATS):
        start = clock()
        function()
        found.append(clock() - start)
    return min(found)
