"""The size of micro-batches in a simulated memory: no endless retry, no thrashing, little left unused."""

import dataclasses
import json
import random
from dataclasses import dataclass

import pytest

from fitune.recovery.size_control import (
    CLEAN_STEPS,
    FIRST_BAN_STEPS,
    LEVEL_RATIO,
    LONGEST_BAN_STEPS,
    MemoryModel,
    Observation,
    choose_size,
    learn,
    memory_model,
)
from fitune.units import GIB, MIB

FIXED, PER_POSITION = GIB, MIB
PLANNED = 8192


@dataclass(frozen=True)
class Memory:
    """A device whose free memory jumps now and then, as other processes come and go.

    noise: of a step's need, relative, one-sided. spike_chance: of steps that need 15 % more. blip_chance: of steps in
    which up to half of what was free is gone when it is needed. jump_steps: mean steps between jumps.
    """

    noise: float = 0.03
    spike_chance: float = 0.0
    blip_chance: float = 0.0
    jump_steps: int = 3000


@dataclass(frozen=True)
class Outcome:
    """Shares of the steps. used: of the largest size that would have fitted, mean."""

    retried: float
    changed: float
    most_retries: int
    used: float


def simulate(memory: Memory, num_steps: int, *, highest: int = 0) -> Outcome:
    draw = random.Random(1)
    chance, gauss, uniform = draw.random, draw.gauss, draw.uniform
    model = MemoryModel(planned=PLANNED, highest=highest)
    free = 12 * GIB
    num_retried = most_retries = 0
    used = 0.0
    for _ in range(num_steps):
        if chance() * memory.jump_steps < 1:
            free = int(uniform(2.5, 16) * GIB)
        size = choose_size(model, free)
        if chance() < 0.1:
            size = int(size * uniform(0.3, 1))  # the last, shorter batch of an epoch
        really_free = free * uniform(0.5, 1) if chance() < memory.blip_chance else free
        num_retries, failed = 0, None
        while True:
            need = (FIXED + PER_POSITION * size) * (1 + abs(gauss(0, memory.noise)))
            if chance() < memory.spike_chance:
                need *= 1.15
            if need <= really_free or size <= 64:
                break
            failed, size, num_retries = size, size // 2, num_retries + 1
        num_retried += num_retries > 0
        most_retries = max(most_retries, num_retries)
        used += min(size / min(PLANNED * LEVEL_RATIO**highest, (free - FIXED) / PER_POSITION), 1)
        need_bytes = None if num_retries else int(need)
        speed = 1000 * size / (size + 3000)
        learn(model, Observation(size, need_bytes, speed, failed_size=failed, free_bytes=free))
    return Outcome(
        num_retried / num_steps, model.num_changes / num_steps, most_retries, used / num_steps
    )


@pytest.mark.parametrize(
    ("memory", "most_retried", "most_changed", "least_used"),
    [
        pytest.param(Memory(), 1e-4, 0.002, 0.75, id="usual"),
        pytest.param(Memory(noise=0.1), 0.002, 0.01, 0.6, id="noisy", marks=pytest.mark.thorough),
        pytest.param(
            Memory(spike_chance=0.01), 0.001, 0.005, 0.7, id="spikes", marks=pytest.mark.thorough
        ),
        pytest.param(Memory(blip_chance=0.01), 0.005, 0.01, 0.4, id="blips"),
        pytest.param(
            Memory(jump_steps=100), 0.001, 0.03, 0.7, id="jumps", marks=pytest.mark.thorough
        ),
    ],
)
def test_in_a_million_steps_few_are_retried_and_little_is_left_unused(
    memory: Memory, most_retried: float, most_changed: float, least_used: float
) -> None:
    outcome = simulate(memory, 200_000)  # a million in the five together
    assert outcome.retried <= most_retried
    assert outcome.changed <= most_changed
    assert outcome.used >= least_used
    assert outcome.most_retries <= 3


def test_without_its_bans_the_same_memory_would_be_tried_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the limits above can be exceeded."""
    restless = Memory(blip_chance=0.05)
    assert simulate(restless, 20_000).retried < 0.003
    monkeypatch.setattr("fitune.recovery.size_control._ban", lambda model, level, free_bytes: None)
    assert simulate(restless, 20_000).retried > 0.01


def settled(model: MemoryModel, free_bytes: int, num_steps: int = 40, speed: float = 100.0) -> None:
    for _ in range(num_steps):
        size = choose_size(model, free_bytes)
        learn(model, Observation(size, FIXED + PER_POSITION * size, speed, free_bytes=free_bytes))


def test_memory_that_is_taken_shrinks_the_size_before_anything_fails_and_it_grows_back() -> None:
    model = MemoryModel(planned=4096)
    settled(model, 8 * GIB)
    learn(model, Observation(2000, FIXED + 2000 * PER_POSITION, 100.0, free_bytes=8 * GIB))
    assert choose_size(model, 4 * GIB) == 2896
    settled(model, 4 * GIB)
    assert choose_size(model, 4 * GIB) == 2896
    settled(model, 8 * GIB, CLEAN_STEPS + 1)
    assert choose_size(model, 8 * GIB) == 4096


def test_a_size_that_fails_again_is_banned_for_twice_as_long() -> None:
    model = MemoryModel(planned=4096)
    waits = []
    for _ in range(4):
        learn(model, Observation(2048, failed_size=4096))
        start = model.step
        while choose_size(model, None) < 4096:
            learn(model, Observation(choose_size(model, None)))
        waits.append(model.step - start)
    assert waits == [FIRST_BAN_STEPS * 2**number for number in range(4)]
    assert max(waits) < LONGEST_BAN_STEPS


def test_a_size_that_held_out_long_is_banned_shortly_again() -> None:
    model = MemoryModel(planned=4096)
    for _ in range(2):
        learn(model, Observation(2048, failed_size=4096))
    last = model.bans[0]
    while model.step < last.until_step + 4 * last.num_steps:
        learn(model, Observation(choose_size(model, None)))
    learn(model, Observation(2048, failed_size=4096))
    assert model.bans[0].num_steps == FIRST_BAN_STEPS


@pytest.mark.parametrize(
    ("free_bytes", "grows"), [(5 * GIB // 2, False), (8 * GIB, True)], ids=["little", "much"]
)
def test_a_ban_ends_early_only_when_much_more_memory_is_free(free_bytes: int, grows: bool) -> None:
    model = MemoryModel(planned=1024)
    settled(model, 8 * GIB)
    learn(model, Observation(512, failed_size=1024, free_bytes=2 * GIB))
    for _ in range(CLEAN_STEPS):
        learn(model, Observation(choose_size(model, free_bytes)))
    assert model.step < model.bans[0].until_step
    assert (choose_size(model, free_bytes) == 1024) == grows


def test_above_the_plan_it_stops_growing_when_it_gains_no_speed() -> None:
    model = MemoryModel(planned=1024, highest=8)
    for _ in range(200):
        size = choose_size(model, 64 * GIB)
        speed = 100.0 * min(size, 2048)
        learn(model, Observation(size, FIXED + PER_POSITION * size, speed, free_bytes=64 * GIB))
    assert model.size(model.level) == 2896  # the first one that was not faster
    assert model.highest == 3


def test_it_never_grows_above_the_plan_unless_it_may() -> None:
    model = MemoryModel(planned=1024)
    settled(model, 64 * GIB, 200)
    assert choose_size(model, 64 * GIB) == 1024


def test_where_no_size_would_fit_a_smaller_one_is_not_taken() -> None:
    model = MemoryModel(planned=1024)
    for size in (1024, 512) * 20:
        learn(model, Observation(size, FIXED + PER_POSITION * size, 100.0, free_bytes=8 * GIB))
    assert choose_size(model, FIXED // 2) == 1024


def test_cached_blocks_that_had_to_be_given_back_shrink_the_next_step() -> None:
    model = MemoryModel(planned=1024)
    learn(model, Observation(1024, GIB, 100.0, free_bytes=2 * GIB, num_alloc_retries=1))
    assert choose_size(model, 2 * GIB) == 724


def test_a_checkpoint_brings_all_of_it_back() -> None:
    model = MemoryModel(planned=4096, prior_slope=3.0)
    settled(model, 8 * GIB)
    learn(model, Observation(2048, failed_size=4096, free_bytes=5 * GIB))
    again = memory_model(json.loads(json.dumps(dataclasses.asdict(model))))
    assert again == model


def test_a_checkpoint_of_an_earlier_version_has_its_level_under_another_name() -> None:
    model = MemoryModel(planned=PLANNED, level=-3)
    content = dataclasses.asdict(model)
    assert memory_model({**content, "rung": content.pop("level")}) == model
