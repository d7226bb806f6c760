"""The time of a step: each operator by what bounds it, a CPU one after the other, a card beside its launches."""

from dataclasses import replace

import pytest

from fitune.machine.devices import find_device
from fitune.planning.cost import (
    ADAMW_OP,
    HOST_BANDWIDTH,
    MAPPED_CALL_BYTES,
    Ceilings,
    OpCost,
    attending,
    card_ceilings,
    mixed,
    seconds_of,
)
from fitune.recorder.events import ON_HOST, TRANSFER

CPU = Ceilings(
    matmul_flops_per_second={"float32": 1e9},
    attention_flops_per_second={"float32": 5e8},
    bandwidths=((1e6, 2e9), (1e8, 1e9)),
    exponential_bandwidth=5e8,
    mapped_bandwidth=1e8,
    launch_seconds=1e-3,
    asynchronous=False,
    origin="the test",
)
MATMUL = OpCost("forward", "aten.mm", "float32", flops=1e9, num_bytes=1e6, launches=1)
ADD = OpCost("forward", "aten.add", "float32", flops=0, num_bytes=1e6, launches=1)


def seconds(*works: OpCost, ceilings: Ceilings = CPU) -> float:
    return seconds_of(works, ceilings)


def test_a_product_takes_its_arithmetic_and_a_sum_its_bytes_and_both_their_launch() -> None:
    assert seconds(MATMUL) == pytest.approx(1.0 + 1e-3)
    assert seconds(ADD) == pytest.approx(1e6 / 2e9 + 1e-3)
    assert seconds(MATMUL, ADD) == pytest.approx(seconds(MATMUL) + seconds(ADD))


def test_a_card_launches_while_it_computes() -> None:
    card = replace(CPU, asynchronous=True)
    assert seconds(MATMUL, ceilings=card) == pytest.approx(1.0)
    assert seconds(replace(ADD, launches=1000), ceilings=card) == pytest.approx(1.0)


def test_attention_has_a_rate_of_its_own_and_goes_with_the_length_of_rows() -> None:
    attention = replace(MATMUL, op="aten._scaled_dot_product_flash_attention_for_cpu")
    assert seconds(attention) == pytest.approx(2.0 + 1e-3)
    assert seconds(*attending((attention, MATMUL), 0.5)) == pytest.approx(1.0 + 1.0 + 2e-3)


def test_large_calls_are_slower_by_the_byte() -> None:
    rates = [size / (seconds(replace(ADD, num_bytes=size)) - 1e-3) for size in (1e5, 1e6, 1e7, 8e7)]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[1] > rates[2] > rates[3] > 1e9


def test_a_result_that_the_c_library_takes_from_the_system_is_slow_but_not_one_in_place() -> None:
    large = replace(ADD, num_bytes=1.01 * MAPPED_CALL_BYTES)
    assert seconds(large) == pytest.approx(large.num_bytes / 1e8 + 1e-3)
    assert seconds(replace(large, op="aten.add_")) < seconds(large) / 5
    assert seconds(replace(large, launches=2)) < seconds(large) / 2
    assert seconds(large, ceilings=replace(CPU, mapped_bandwidth=None)) < seconds(large) / 5


def test_an_exponential_takes_longer_than_a_sum_of_as_many_bytes_but_on_a_card() -> None:
    silu = replace(ADD, op="aten.silu")
    assert seconds(silu) == pytest.approx(1e6 / 5e8 + 1e-3)
    assert seconds(silu, ceilings=replace(CPU, exponential_bandwidth=None)) == seconds(ADD)


@pytest.mark.parametrize(
    ("card", "link"), [("RTX 4090", 16 * 1.969e9), ("RTX 4060", 8 * 1.969e9), ("T4", 16 * 0.985e9)]
)
def test_what_crosses_takes_the_time_of_the_link_and_an_update_there_that_of_the_host(
    card: str, link: float
) -> None:
    ceilings = card_ceilings(find_device(card))
    assert ceilings is not None
    crossing = OpCost("optimizer", TRANSFER, "float32", flops=0, num_bytes=12e9, launches=1)
    updating = replace(crossing, op=f"{ON_HOST}{ADAMW_OP}", num_bytes=28e9)
    assert seconds(crossing, ceilings=ceilings) == pytest.approx(12e9 / (0.8 * link))
    assert seconds(crossing, updating, ceilings=ceilings) == pytest.approx(
        12e9 / (0.8 * link) + 28e9 / HOST_BANDWIDTH
    )


def test_what_is_taken_away_leaves_no_less_than_nothing() -> None:
    (left,) = mixed((1.0, [ADD]), (-2.0, [ADD]))
    assert (left.num_bytes, left.launches) == (0, 0)


def test_a_card_whose_rates_are_unknown_has_no_times() -> None:
    card = find_device("RTX 4090")
    assert card_ceilings(card) is not None
    assert card_ceilings(replace(card, bandwidth_bytes_per_second=None)) is None
