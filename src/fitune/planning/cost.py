"""Seconds of an optimizer step, from the operators that were recorded and what the device does at most.

A roofline for each kind of operator (Williams, Waterman, Patterson 2009): it takes as long as its arithmetic at the
device's rate or its bytes at the memory's, whichever is longer, and a launch. A CPU does one after the other; a card
runs them while the next ones are launched, so there the longer of both sums counts. What a run has measured on this
device corrects the level (`planning/calibration.py`); the order of the candidates is the roofline's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fitune.machine.cards import Device
from fitune.trace.events import ON_HOST, TRANSFER, OperatorWork

CARD_MATMUL_SHARE = 0.7
CARD_ATTENTION_SHARE = 0.4
CARD_BANDWIDTH_SHARE = 0.8
"""Of the data sheet's rates: what large kernels reach of them. FlashAttention-2 reaches 50 to 73 % of an A100's forward
and backward (Dao 2023, arXiv 2307.08691), less with short rows; PaLM and Megatron report 40 to 60 % of the whole step,
idle times and pointwise operators included (Chowdhery et al. 2022; Korthikanti et al. 2022)."""
LINK_SHARE = 0.8
"""Of what the lanes between card and host carry in one direction, what large copies of pinned memory reach."""
HOST_BANDWIDTH = 40e9
"""Bytes a second that an optimizer's update reads and writes in the host's memory: fused AdamW on one core of an EPYC
server moved 42e9 (25.8 M parameters, 28 bytes each, in 0.017 s)."""
CARD_LAUNCH_SECONDS = 8e-6
"""Of an eager operator and its part of autograd, on the processor that feeds the card."""
SELECTIVE_LAUNCHES = 12.0
"""Selective recomputing asks a Python function about every operator: each that is done again costs so many launches
more (fitted to the settings of benchmarks/plan.py on a CPU, of which twelve recompute so)."""
ADAMW_OP = "aten._fused_adamw_"
"""Reads four numbers of each parameter and writes three."""
_EXPONENTIALS = {
    f"aten.{name}"
    for name in (
        *("exp", "exp_", "_softmax", "_log_softmax", "_log_softmax_backward_data", "sigmoid", "sigmoid_", "tanh"),
        *("silu", "silu_", "silu_backward", "gelu", "gelu_backward", "softplus", "softplus_backward"),
    )
}
MAPPED_CALL_BYTES = 2.5 * 32 * 2**20
"""Moved by a call: glibc takes blocks from 32 MiB on from the system (DEFAULT_MMAP_THRESHOLD_MAX of its malloc), and
gives them back. Such a call reads one or two tensors for the one that it makes."""


@dataclass(frozen=True, slots=True)
class OpCost:
    """All calls of one operator in a phase of a micro-batch, or in the optimizer's part of a step."""

    phase: str
    op: str
    dtype: str
    flops: float
    num_bytes: float
    launches: float


@dataclass(frozen=True, slots=True)
class StepWork:
    """first: of the first micro-batch of a step; later: of each further one, which adds to the gradients; update: what
    is done once. positions: tokens of a micro-batch. row_tokens: of the row that a token is in, on average. packed:
    whether rows are joined."""

    positions: int
    row_tokens: float
    packed: bool
    first: tuple[OpCost, ...]
    later: tuple[OpCost, ...]
    update: tuple[OpCost, ...]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """matmul_flops_per_second, attention_flops_per_second: by dtype. bandwidths: (bytes that a call moves, bytes per
    second), ascending; between them the logarithm decides, as caches do. exponential_bandwidth: of operators that
    compute an exponential for each element. mapped_bandwidth: of calls whose results are too large for the C library's
    heap, so that each page is asked of the system anew. Both None on a card. asynchronous: whether launches go on while
    kernels run. origin: of the numbers, in words. link_bandwidth: between a card and the host."""

    matmul_flops_per_second: Mapping[str, float]
    attention_flops_per_second: Mapping[str, float]
    bandwidths: Sequence[tuple[float, float]]
    exponential_bandwidth: float | None
    mapped_bandwidth: float | None
    launch_seconds: float
    asynchronous: bool
    origin: str
    link_bandwidth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The mean step of the run: micro-batches, and what they hold in all. positions: padding too. row_tokens: of the
    row that a token is in, on average, which is what attention sees."""

    num_micro_batches: float
    positions: float
    supervised: float
    row_tokens: float


def card_ceilings(device: Device) -> Ceilings | None:
    """From the catalogue's rates; None where the card is not in it."""
    half, single = device.float16_flops_per_second, device.float32_flops_per_second
    bandwidth = device.bandwidth_bytes_per_second
    if half is None or single is None or bandwidth is None:
        return None
    rates = {"float16": half, "bfloat16": device.bfloat16_flops_per_second or single, "float32": single}
    return Ceilings(
        matmul_flops_per_second={dtype: CARD_MATMUL_SHARE * rate for dtype, rate in rates.items()},
        attention_flops_per_second={dtype: CARD_ATTENTION_SHARE * rate for dtype, rate in rates.items()},
        bandwidths=((1.0, CARD_BANDWIDTH_SHARE * bandwidth),),
        exponential_bandwidth=None,
        mapped_bandwidth=None,
        launch_seconds=CARD_LAUNCH_SECONDS,
        asynchronous=True,
        origin=f"rates of {device.name}'s data sheet, {CARD_MATMUL_SHARE:.0%} of them in matrix products",
        link_bandwidth=None if device.link_bytes_per_second is None else LINK_SHARE * device.link_bytes_per_second,
    )


def work_of(operators: Sequence[OperatorWork], *, rows: Sequence[tuple[int, int]], packed: bool) -> StepWork:
    """From a recording whose last step is two micro-batches of these rows (tokens, supervised)."""
    last_step = max(each.step for each in operators)
    positions = sum(length for length, _ in rows)

    def part(is_part: Callable[[OperatorWork], bool]) -> tuple[OpCost, ...]:
        wanted = (each for each in operators if each.step == last_step and is_part(each))
        return mixed(
            (
                1.0,
                [
                    OpCost(each.phase, each.op, each.dtype, each.flops, each.num_bytes, each.num_calls)
                    for each in wanted
                ],
            )
        )

    return StepWork(
        positions=positions,
        row_tokens=sum(length**2 for length, _ in rows) / positions,
        packed=packed,
        first=part(lambda each: each.phase != "optimizer" and each.micro_batch == 0),
        later=part(lambda each: each.phase != "optimizer" and each.micro_batch == 1),
        update=part(lambda each: each.phase == "optimizer"),
    )


def hosted(update: Sequence[OpCost]) -> tuple[OpCost, ...]:
    """AdamW's update by HostAdamW: parameters and gradients come to the host in float32, parameters go back."""
    found = []
    for work in update:
        if work.op != ADAMW_OP:
            found.append(work)
            continue
        num_parameters = work.num_bytes / (7 * (4 if work.dtype == "float32" else 2))
        found += [
            replace(work, op=TRANSFER, num_bytes=3 * 4 * num_parameters),
            replace(work, op=f"{ON_HOST}{ADAMW_OP}", dtype="float32", num_bytes=7 * 4 * num_parameters),
        ]
    return tuple(found)


def attending(works: Sequence[OpCost], share: float) -> tuple[OpCost, ...]:
    """With attention over rows of that share of the length."""
    return tuple(replace(work, flops=work.flops * share) if _is_attention(work) else work for work in works)


def mixed(*terms: tuple[float, Sequence[OpCost]]) -> tuple[OpCost, ...]:
    """The weighted sum, operator by operator, never less than nothing."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for weight, works in terms:
        for work in works:
            total = sums.setdefault((work.phase, work.op, work.dtype), [0.0, 0.0, 0.0])
            for index, amount in enumerate((work.flops, work.num_bytes, work.launches)):
                total[index] += weight * amount
    return tuple(OpCost(*key, *(max(0.0, amount) for amount in total)) for key, total in sums.items())


def num_launches(works: Sequence[OpCost]) -> float:
    return sum(work.launches for work in works)


def seconds_of(works: Sequence[OpCost], ceilings: Ceilings, *, more_launches: float = 0.0) -> float:
    """more_launches: what the host does besides."""
    launches = (num_launches(works) + more_launches) * ceilings.launch_seconds
    host = sum(work.num_bytes for work in works if work.op.startswith(ON_HOST)) / HOST_BANDWIDTH
    kernels = sum(_kernel_seconds(work, ceilings) for work in works if not work.op.startswith(ON_HOST))
    return host + (max(kernels, launches) if ceilings.asynchronous else kernels + launches)


def _kernel_seconds(work: OpCost, ceilings: Ceilings) -> float:
    if work.op == TRANSFER and ceilings.link_bandwidth is not None:
        return work.num_bytes / ceilings.link_bandwidth
    call_bytes = work.num_bytes / max(work.launches, 1.0)
    rate = _bandwidth(call_bytes, ceilings.bandwidths)
    if ceilings.mapped_bandwidth is not None and call_bytes > MAPPED_CALL_BYTES and not work.op.endswith("_"):
        rate = ceilings.mapped_bandwidth
    if ceilings.exponential_bandwidth is not None and work.op in _EXPONENTIALS:
        rate = min(rate, ceilings.exponential_bandwidth)
    moving = work.num_bytes / rate
    rates = ceilings.attention_flops_per_second if _is_attention(work) else ceilings.matmul_flops_per_second
    return max(moving, work.flops / rates.get(work.dtype, rates["float32"]))


def _is_attention(work: OpCost) -> bool:
    return "attention" in work.op or "varlen" in work.op


def _bandwidth(call_bytes: float, bandwidths: Sequence[tuple[float, float]]) -> float:
    (small, fast), (large, slow) = bandwidths[0], bandwidths[-1]
    if call_bytes <= small:
        return fast
    if call_bytes >= large:
        return slow
    share = math.log(call_bytes / small) / math.log(large / small)
    return 1 / ((1 - share) / fast + share / slow)
