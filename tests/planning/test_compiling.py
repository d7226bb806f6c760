"""What a plan says of `model.compile`: what it saves of a step, and whether the run is long enough."""

from dataclasses import replace
from pathlib import Path

import pytest

from fitune.config import read_config
from fitune.language import translated
from fitune.machine.devices import find_device
from fitune.planning import rates
from fitune.planning.compiling import (
    COMPILE_SECONDS,
    COMPILED_KERNELS,
    COMPILED_OVERHEAD,
    compile_note,
    saved_launches,
)
from fitune.planning.cost import CARD_LAUNCH_SECONDS, OpCost, card_ceilings
from fitune.planning.plan import COMPILING, Plan
from fitune.planning.pricing import _ceilings_of
from fitune.planning.search import choose_plan

LAYERS = 4


def calls(op: str, number: float, *, flops: float = 0) -> OpCost:
    return OpCost("forward", op, "bfloat16", flops=flops, num_bytes=1e3, launches=number)


def test_what_every_layer_has_is_fused_and_what_is_outside_is_not() -> None:
    lost = LAYERS * (COMPILED_KERNELS + COMPILED_OVERHEAD)
    inside = [calls("aten.mul", 40 * LAYERS + 3), calls("aten.cos", 1)]
    outside = [
        calls("aten.mm", 8 * LAYERS, flops=1e9),
        calls("aten.add_", 9 * LAYERS),
        calls("aten.empty_like", 5 * LAYERS),
    ]
    assert saved_launches([*inside, *outside], LAYERS) == 40 * LAYERS - lost
    assert saved_launches(outside, LAYERS) == -lost


@pytest.mark.parametrize(
    ("saved", "steps", "end"),
    [
        (0.0, 100, "nothing of the 10 ms of a step (predicted, not measured)"),
        (-0.004, 100, "nothing of the 10 ms of a step (predicted, not measured)"),
        (0.0002, 100, "nothing of the 10 ms of a step (predicted, not measured)"),
        (0.002, None, "worth it from 30,000 steps on"),
        (0.002, 100_000, "): worth it, 3m20s over this run"),
        (0.002, 1_000, "not worth it, 2.0s over this run"),
    ],
)
def test_the_run_s_length_decides(
    saved: float, steps: float | None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = compile_note(0.01, 0.01 - saved, num_steps=steps)
    assert note.startswith(COMPILING)
    assert note.endswith(end)
    if "nothing" not in note:
        assert "about 2 ms of the 10 ms" in note
        assert f"about {COMPILE_SECONDS:.0f} s (predicted, not measured)" in note
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert "would" not in translated(note)


def notes(plan: Plan) -> list[str]:
    return [line for line in plan.assumptions if line.startswith(COMPILING)]


def plan(*settings: str, gpu: str = "RTX 4090") -> Plan:
    tree = {
        "model": {"source": "minimind2-small", "init": "random"},
        "data": {"train": "none", "max_length": 64},
        "batch": {"effective": 4},
        "train": {"steps": 50},
    }
    return choose_plan(read_config(tree, list(settings)).config, gpu=gpu, search="fastest")


def test_a_plan_for_a_card_says_what_compiling_would_save_and_does_not_switch_it_on() -> None:
    (note,) = notes(plan())
    assert "nothing of the" in note, "fused layers leave compiling no launches to save"
    (note,) = notes(plan("model.method=lora", "model.precision=bfloat16"))
    assert "not worth it" in note, "adapters have many small operators, and 50 steps are few"
    assert not notes(plan("model.compile=true"))
    assert not notes(plan(gpu="cpu"))


def test_a_card_that_is_here_is_launched_for_by_the_processor_that_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = find_device("RTX 4090")
    monkeypatch.setattr("fitune.planning.pricing.launch_seconds_here", lambda: 2e-5)
    elsewhere, here = _ceilings_of(card), _ceilings_of(replace(card, free_bytes=20 * 2**30))
    assert elsewhere is not None
    assert here is not None
    assert (elsewhere.launch_seconds, here.launch_seconds) == (CARD_LAUNCH_SECONDS, 2e-5)
    assert replace(here, launch_seconds=CARD_LAUNCH_SECONDS) == elsewhere == card_ceilings(card)


def test_the_launches_of_this_processor_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    rates.launch_seconds_here.cache_clear()
    assert 1e-6 < rates.launch_seconds_here() < 1e-2
    monkeypatch.setattr(rates, "_best", lambda _: 1 / 0)
    rates.launch_seconds_here.cache_clear()
    assert 1e-6 < rates.launch_seconds_here() < 1e-2, "read from the cache"
    rates.launch_seconds_here.cache_clear()


def test_a_long_step_is_said_in_whole_milliseconds() -> None:
    assert "46,600 ms" in compile_note(46.6, 46.5, num_steps=None)
