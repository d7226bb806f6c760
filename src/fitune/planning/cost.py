"""Computes the seconds of an optimizer step from its recorded operators and the device's rates.

Every kind of operator has a roofline (Williams, Waterman, Patterson 2009): it takes as long as its
arithmetic at the device's FLOP/s or its memory traffic at the device's bandwidth, whichever is
longer, and in addition a launch. A CPU launches and computes one operator after the other. A card
computes while the next operators are launched, so there the longer of both sums counts. Measured
times of earlier runs scale the result (`planning/calibration.py`); the order of the candidates
follows from the roofline alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fitune.machine.cards import Device
from fitune.recorder.events import ON_HOST, TRANSFER, OperatorWork

# The fractions of the data sheet's rates that large kernels reach. FlashAttention-2 reaches 50 to
# 73 % of an A100's FLOP/s in forward and backward (Dao 2023, arXiv 2307.08691), less with short
# samples. PaLM and Megatron report 40 to 60 % for the whole step, which includes idle times and
# pointwise operators (Chowdhery et al. 2022; Korthikanti et al. 2022).
CARD_MATMUL_SHARE = 0.7
CARD_ATTENTION_SHARE = 0.4
CARD_BANDWIDTH_SHARE = 0.8
#: the fraction of the one-way PCIe rate that large copies of pinned memory reach
LINK_SHARE = 0.8
#: bytes per second that an optimizer's update reads and writes in the host's memory: fused AdamW on
#: one core of an EPYC server moved 42e9 (25.8 M parameters, 28 bytes each, in 0.017 s)
HOST_BANDWIDTH = 40e9
#: An eager operator with its part of autograd, on the processor that launches for the card. This
#: is no property of the card, so a card in this machine takes what is measured of its processor
#: (`rates.launch_seconds_here`), and one elsewhere this value: of a processor somewhat faster than
#: the server's on which that is 9.4 us.
CARD_LAUNCH_SECONDS = 8e-6
#: Selective checkpointing calls a Python function for every operator, so each recomputed operator
#: costs so many launches more. Fitted to the settings of benchmarks/plan.py on a CPU, twelve of
#: which use selective checkpointing.
SELECTIVE_LAUNCHES = 12.0
#: reads four numbers of each parameter and writes three
ADAMW_OP = "aten._fused_adamw_"
#: operators that compute an exponential for each element
_EXPONENTIALS = {
    "aten.exp", "aten.exp_", "aten.sigmoid", "aten.sigmoid_", "aten.tanh",
    "aten._softmax", "aten._log_softmax", "aten._log_softmax_backward_data",
    "aten.silu", "aten.silu_", "aten.silu_backward", "aten.gelu", "aten.gelu_backward",
    "aten.softplus", "aten.softplus_backward",
}  # fmt: skip
#: A call that moves more than this allocates its result with mmap: glibc requests blocks from
#: 32 MiB on from the system (DEFAULT_MMAP_THRESHOLD_MAX of its malloc), and returns them when they
#: are freed. Such a call reads one or two tensors for the one that it writes.
MAPPED_CALL_BYTES = 2.5 * 32 * 2**20


@dataclass(frozen=True, slots=True)
class OpCost:
    """The sum over all calls of one operator in a phase of a micro-batch, or in the update."""

    phase: str
    op: str
    dtype: str
    flops: float
    num_bytes: float
    launches: float


@dataclass(frozen=True, slots=True)
class StepWork:
    """The operators of an optimizer step, as they were recorded for one size of micro-batch."""

    #: tokens of a micro-batch, padding included
    positions: int
    #: the length of the sample that a token is in, as a mean over all tokens
    row_tokens: float
    #: whether samples are packed into one row
    packed: bool
    #: of the first micro-batch of a step
    first: tuple[OpCost, ...]
    #: of each further micro-batch, which adds to the gradients
    later: tuple[OpCost, ...]
    #: of the optimizer's update, once per step
    update: tuple[OpCost, ...]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The highest rates of a device."""

    #: by dtype
    matmul_flops_per_second: Mapping[str, float]
    #: by dtype
    attention_flops_per_second: Mapping[str, float]
    #: (bytes that a call moves, bytes per second), ascending in the first; between two entries the
    #: rate is interpolated over the logarithm of the bytes, since caches have an effect like that
    bandwidths: Sequence[tuple[float, float]]
    #: bytes per second of operators that compute an exponential for each element; None on a card
    exponential_bandwidth: float | None
    #: bytes per second of calls whose results are too large for the C library's heap, so that the
    #: system provides every page anew; None on a card
    mapped_bandwidth: float | None
    launch_seconds: float
    #: whether further operators are launched while kernels run
    asynchronous: bool
    #: where the numbers are from, as text
    origin: str
    #: bytes per second between a card and the host
    link_bandwidth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The mean optimizer step of a run: its micro-batches, and the totals over them."""

    num_micro_batches: float
    #: tokens, padding included
    positions: float
    #: tokens that are targets
    supervised: float
    #: the length of the sample that a token is in, as a mean over all tokens: attention's work
    #: grows with it
    row_tokens: float


def card_ceilings(device: Device, *, launch_seconds: float | None = None) -> Ceilings | None:
    """Return the rates of a card of the catalogue; None for a card that is not in it.

    launch_seconds: of the processor that launches; None where it is not known.
    """
    half, single = device.float16_flops_per_second, device.float32_flops_per_second
    bandwidth = device.bandwidth_bytes_per_second
    if half is None or single is None or bandwidth is None:
        return None
    rates = {
        "float16": half,
        "bfloat16": device.bfloat16_flops_per_second or single,
        "float32": single,
    }
    link = device.link_bytes_per_second
    share = f"{CARD_MATMUL_SHARE:.0%}"
    return Ceilings(
        matmul_flops_per_second={dtype: CARD_MATMUL_SHARE * rate for dtype, rate in rates.items()},
        attention_flops_per_second={
            dtype: CARD_ATTENTION_SHARE * rate for dtype, rate in rates.items()
        },
        bandwidths=((1.0, CARD_BANDWIDTH_SHARE * bandwidth),),
        exponential_bandwidth=None,
        mapped_bandwidth=None,
        launch_seconds=launch_seconds or CARD_LAUNCH_SECONDS,
        asynchronous=True,
        origin=f"rates of {device.name}'s data sheet, {share} of them in matrix products",
        link_bandwidth=None if link is None else LINK_SHARE * link,
    )


def work_of(
    operators: Sequence[OperatorWork], *, rows: Sequence[tuple[int, int]], packed: bool
) -> StepWork:
    """Return the work of a step, from a recording whose last step has two equal micro-batches.

    rows: (tokens, supervised tokens) of each sample of a micro-batch.
    """
    last_step = max(each.step for each in operators)
    positions = sum(length for length, _ in rows)

    def part(is_part: Callable[[OperatorWork], bool]) -> tuple[OpCost, ...]:
        costs = [
            OpCost(each.phase, each.op, each.dtype, each.flops, each.num_bytes, each.num_calls)
            for each in operators
            if each.step == last_step and is_part(each)
        ]
        return mixed((1.0, costs))

    return StepWork(
        positions=positions,
        row_tokens=sum(length**2 for length, _ in rows) / positions,
        packed=packed,
        first=part(lambda each: each.phase != "optimizer" and each.micro_batch == 0),
        later=part(lambda each: each.phase != "optimizer" and each.micro_batch == 1),
        update=part(lambda each: each.phase == "optimizer"),
    )


def update_on_host(update: Sequence[OpCost]) -> tuple[OpCost, ...]:
    """Return what HostAdamW does instead of this update of AdamW on the card.

    It copies parameters and gradients to the host in float32, updates there, and copies the
    parameters back.
    """
    found = []
    for work in update:
        if work.op != ADAMW_OP:
            found.append(work)
            continue
        num_parameters = work.num_bytes / (7 * (4 if work.dtype == "float32" else 2))
        found += [
            replace(work, op=TRANSFER, num_bytes=3 * 4 * num_parameters),
            replace(
                work, op=f"{ON_HOST}{ADAMW_OP}", dtype="float32", num_bytes=7 * 4 * num_parameters
            ),
        ]
    return tuple(found)


def attending(works: Sequence[OpCost], share: float) -> tuple[OpCost, ...]:
    """Return the same work with attention over samples whose length is this share of the former."""
    return tuple(
        replace(work, flops=work.flops * share) if _is_attention(work) else work for work in works
    )


def mixed(*terms: tuple[float, Sequence[OpCost]]) -> tuple[OpCost, ...]:
    """Return the weighted sum of work, operator by operator; a negative sum becomes 0.

    terms: (weight, work).
    """
    sums: dict[tuple[str, str, str], list[float]] = {}
    for weight, works in terms:
        for work in works:
            total = sums.setdefault((work.phase, work.op, work.dtype), [0.0, 0.0, 0.0])
            for index, amount in enumerate((work.flops, work.num_bytes, work.launches)):
                total[index] += weight * amount
    return tuple(
        OpCost(*key, *(max(0.0, amount) for amount in total)) for key, total in sums.items()
    )


def num_launches(works: Sequence[OpCost]) -> float:
    return sum(work.launches for work in works)


def seconds_of(works: Sequence[OpCost], ceilings: Ceilings, *, more_launches: float = 0.0) -> float:
    """Return the seconds that this work takes at these rates.

    more_launches: other work of the host, in launches.
    """
    launches = (num_launches(works) + more_launches) * ceilings.launch_seconds
    host = sum(work.num_bytes for work in works if work.op.startswith(ON_HOST)) / HOST_BANDWIDTH
    kernels = sum(
        _kernel_seconds(work, ceilings) for work in works if not work.op.startswith(ON_HOST)
    )
    return host + (max(kernels, launches) if ceilings.asynchronous else kernels + launches)


def _kernel_seconds(work: OpCost, ceilings: Ceilings) -> float:
    if work.op == TRANSFER and ceilings.link_bandwidth is not None:
        return work.num_bytes / ceilings.link_bandwidth
    call_bytes = work.num_bytes / max(work.launches, 1.0)
    rate = _bandwidth(call_bytes, ceilings.bandwidths)
    if (
        ceilings.mapped_bandwidth is not None
        and call_bytes > MAPPED_CALL_BYTES
        and not work.op.endswith("_")
    ):
        rate = ceilings.mapped_bandwidth
    if ceilings.exponential_bandwidth is not None and work.op in _EXPONENTIALS:
        rate = min(rate, ceilings.exponential_bandwidth)
    moving = work.num_bytes / rate
    rates = (
        ceilings.attention_flops_per_second
        if _is_attention(work)
        else ceilings.matmul_flops_per_second
    )
    return max(moving, work.flops / rates.get(work.dtype, rates["float32"]))


def _is_attention(work: OpCost) -> bool:
    return "attention" in work.op or "varlen" in work.op


def _bandwidth(call_bytes: float, bandwidths: Sequence[tuple[float, float]]) -> float:
    """Return the bytes per second of a call that moves so many bytes, see `Ceilings.bandwidths`."""
    (small, fast), (large, slow) = bandwidths[0], bandwidths[-1]
    if call_bytes <= small:
        return fast
    if call_bytes >= large:
        return slow
    share = math.log(call_bytes / small) / math.log(large / small)
    return 1 / ((1 - share) / fast + share / slow)
