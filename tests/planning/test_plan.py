"""What a plan promises: parts that add up, the fastest that fits, the contract of its JSON, exit 3."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig

import fitune
from fitune.cli.app import main
from fitune.cli.output import Screen
from fitune.cli.plan import _candidate
from fitune.cli.plan_table import show_plan
from fitune.config import RunConfig, read_config
from fitune.errors import ConfigError, UsageError
from fitune.machine.devices import find_device
from fitune.planning.choices import (
    Choice,
    host_choices,
    same_choices,
    settings_of_candidate,
    still_open,
)
from fitune.planning.limits import MemoryLimits, find_limits, uniform_lengths
from fitune.planning.other_estimates import other_estimates
from fitune.planning.plan import FirstAnswer, Plan, closest, does_not_fit, plan_json
from fitune.planning.predict import predict
from fitune.planning.pricing import Bound
from fitune.planning.search import Search, _Search, choose_plan
from fitune.planning.second_process import divide
from fitune.recorder.events import CATEGORIES, ROUTED, UNROUTED
from fitune.trace import library as recordings
from fitune.units import format_bytes, format_gib, parse_bytes
from tiny_models import TINY, TINY_DBRX

SEGMENT_BYTES = 20 * 2**20
"""That the allocator reserves for blocks of 1 to 10 MiB."""
CANDIDATE_KEYS = {
    "micro_batch", "micro_tokens", "accumulation", "recompute", "loss", "optimizer", "precision", "method",
    "attention", "packing", "predicted_allocated_bytes", "predicted_reserved_bytes", "predicted_device_bytes",
    "categories", "peak_phase", "predicted_seconds_per_step", "fits", "reason", "result", "offload_activations",
    "predicted_host_bytes",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all tests here: a plan that was made once is read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    TINY["llama"].save_pretrained(directory)
    return str(directory)


@pytest.fixture
def tree(model: str) -> dict[str, Any]:
    return {
        "model": {"source": model},
        "data": {"train": "missing.jsonl", "max_length": 1024},
        "batch": {"effective": 4},
    }


@pytest.fixture(scope="module")
def wide(model: str) -> Plan:
    """On a card where all fits."""
    return choose_plan(config({"model": {"source": model}, **REST}), gpu="RTX 4090")


REST: dict[str, Any] = {
    "data": {"train": "missing.jsonl", "max_length": 1024},
    "batch": {"effective": 4},
}


def config(tree: dict[str, Any], *overrides: str) -> RunConfig:
    return read_config(tree, overrides).config


def command(tree: dict[str, Any], *words: str) -> list[str]:
    arguments = [
        f"{section}.{key}={value}" for section, keys in tree.items() for key, value in keys.items()
    ]
    return ["plan", *arguments, *words]


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
def test_the_categories_add_up_to_the_peak(tree: dict[str, Any], gpu: str) -> None:
    prediction = predict(tree, gpu=gpu)
    assert sum(prediction.categories.values()) == prediction.peak_allocated_bytes
    assert (
        prediction.peak_allocated_bytes
        <= prediction.peak_reserved_bytes
        <= (prediction.device_bytes or 0)
    )


def test_the_categories_of_every_candidate_add_up(wide: Plan) -> None:
    assert all(
        sum(each.categories.values()) == each.predicted_allocated_bytes for each in wide.candidates
    )


def test_more_rows_never_need_less(wide: Plan) -> None:
    for techniques in {each.techniques for each in wide.candidates}:
        same = [
            each
            for each in wide.candidates
            if (each.result, each.techniques) == ("same", techniques)
        ]
        for loss in ("chunked", "full"):
            peaks = [
                each.predicted_allocated_bytes
                for each in sorted(same, key=rows)
                if each.loss == loss
            ]
            assert peaks == sorted(peaks)


def rows(candidate: Any) -> int:
    return int(candidate.micro_batch)


def test_all_splits_of_a_step_are_looked_at(wide: Plan) -> None:
    assert {(each.micro_batch, each.accumulation) for each in wide.candidates} == {
        (1, 4),
        (2, 2),
        (4, 1),
    }


def test_recomputing_needs_less_and_takes_longer(wide: Plan) -> None:
    same = (each for each in wide.candidates if each.result == "same")
    chosen = {each.techniques: each for each in same if (rows(each), each.loss) == (4, "chunked")}
    kept = [chosen[name,].categories["activation"] for name in ("off", "full")]
    seconds = [
        chosen[techniques].predicted_seconds_per_step or 0 for techniques in (("off",), ("full",))
    ]
    assert kept[0] > kept[1]
    assert seconds[0] < seconds[1]


def test_what_changes_the_result_is_never_chosen(wide: Plan) -> None:
    assert {each.result for each in wide.candidates} >= {"same", "different"}
    assert wide.chosen is not None
    assert wide.candidates[wide.chosen].result == "same"


def test_the_fastest_that_fits_is_chosen(wide: Plan) -> None:
    assert wide.chosen is not None
    fitting = [
        each.predicted_seconds_per_step
        for each in wide.candidates
        if each.fits and each.result == "same"
    ]
    assert wide.candidates[wide.chosen].predicted_seconds_per_step == min(filter(None, fitting))


class Drawn:
    """Stands for the forecaster and the pricer: seconds and bytes of each choice are drawn."""

    def __init__(self, figures: list[tuple[float, int]], limit_bytes: int) -> None:
        self.config = config({"model": {"source": "none"}, **REST})
        self.lengths = uniform_lengths(self.config)
        self.limits = replace(
            find_limits(self.config.memory, gpu="RTX 4090"), budget_bytes=limit_bytes
        )
        same = list(same_choices(self.config, self.lengths, on_card=True))
        self.figures = dict(
            zip(
                [*same, *host_choices(self.config.model, self.config.optim, same)],
                figures,
                strict=False,
            )
        )

    def forecast(self, choice: Choice) -> Any:
        fits = self.figures[choice][1] <= self.limits.limit_bytes
        return SimpleNamespace(fits=fits, allocated_bytes=0, context_bytes=0)

    def seconds(self, choice: Choice, *, bound: Bound | None = None) -> float:
        return (
            min(seconds for seconds, _ in self.figures.values())
            if bound
            else self.figures[choice][0]
        )

    def search(self) -> _Search:
        search = _Search(self.config, self, None)  # type: ignore[arg-type]
        search.choices = [choice for choice in self.figures if choice.optimizer is None]
        search.on_host = [choice for choice in self.figures if choice.optimizer is not None]
        search.pricer = self  # type: ignore[assignment]
        return search


FIGURES = st.lists(
    st.tuples(st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.integers(1, 100)), min_size=1, max_size=33
)


@given(FIGURES, st.integers(0, 100), st.integers(0, 100))
def test_a_larger_budget_never_gives_a_slower_plan(
    figures: list[tuple[float, int]], first: int, second: int
) -> None:
    drawn = [Drawn(figures, limit) for limit in sorted((first, second))]
    small, large = (each.search().lean() for each in drawn)
    if small is not None:
        assert large is not None
        assert drawn[1].seconds(large) <= drawn[0].seconds(small)


@given(FIGURES, st.integers(0, 100))
def test_best_first_finds_the_fastest_that_fits(
    figures: list[tuple[float, int]], limit: int
) -> None:
    drawn = Drawn(figures, limit)
    found = drawn.search().lean()
    fitting = [seconds for seconds, num_bytes in drawn.figures.values() if num_bytes <= limit]
    assert (None if found is None else drawn.seconds(found)) == min(fitting, default=None)


@pytest.mark.parametrize("share", [0.3])
def test_looking_at_all_or_at_the_fastest_first_chooses_the_same(
    wide: Plan, tree: dict[str, Any], share: float
) -> None:
    sizes = [each.predicted_device_bytes for each in wide.candidates if each.result == "same"]
    budget = f"memory.budget={int(min(sizes) + share * (max(sizes) - min(sizes)))}B"
    first, second = (
        choose_plan(config(tree, budget), gpu="RTX 4090", search=each)
        for each in ("all", "fastest")
    )
    assert first.chosen is not None
    assert second.chosen is not None
    assert first.candidates[first.chosen] == second.candidates[second.chosen]
    assert len(second.candidates) < len(first.candidates)


def test_a_brief_plan_chooses_as_a_whole_one_and_knows_the_leanest(
    wide: Plan, tree: dict[str, Any]
) -> None:
    brief = choose_plan(config(tree), gpu="RTX 4090", search="brief")
    assert wide.chosen is not None
    assert brief.chosen is not None
    assert brief.candidates[brief.chosen] == wide.candidates[wide.chosen]
    least, known = (
        min(each.predicted_device_bytes for each in plan.candidates if each.result == "same")
        for plan in (wide, brief)
    )
    assert (
        known <= least + SEGMENT_BYTES
    )  # of a model this small, the number of segments decides, not its size
    assert len(brief.candidates) < len(wide.candidates) / 2


def test_the_price_of_an_update_on_the_host_records_no_other_optimizer(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []
    whole = recordings.record_columns_of_step

    def record(config: RunConfig, *args: Any, **settings: Any) -> Any:
        recorded.append(config.optim.name)
        return whole(config, *args, **settings)

    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(recordings, "record_columns_of_step", record)
    choose_plan(config(tree), gpu="RTX 4090", search="fastest")
    assert set(recorded) == {"adamw"}


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a model whose optimizer state is most of what there is."""
    directory = tmp_path_factory.mktemp("heavy")
    LlamaConfig(**TINY["llama"].to_dict() | {"vocab_size": 2**17}).save_pretrained(directory)
    tree = {
        "model": {"source": str(directory)},
        "data": {"train": "missing.jsonl", "max_length": 64},
    }
    return config({**tree, "batch": {"effective": 4}})


@pytest.fixture(scope="module")
def tight(heavy: RunConfig) -> MemoryLimits:
    """Of a card on which it fits with its state in the host's memory alone."""
    roomy = choose_plan(heavy, gpu="RTX 4090", search="brief")
    assert "adamw_host" not in {
        each.optimizer for each in roomy.candidates
    }  # none of them would be faster
    least = min(each.predicted_device_bytes for each in roomy.candidates if each.result == "same")
    return replace(find_limits(heavy.memory, gpu="RTX 4090"), budget_bytes=least - 2**23)


@pytest.mark.parametrize("search", ["all", "brief", "fastest"])
def test_where_nothing_else_fits_the_host_updates(
    heavy: RunConfig, tight: MemoryLimits, search: Search
) -> None:
    plan = choose_plan(heavy, limits=tight, search=search)
    assert plan.chosen is not None
    chosen = plan.candidates[plan.chosen]
    assert (chosen.optimizer, chosen.result, chosen.categories["optimizer_state"]) == (
        "adamw_host",
        "same",
        0,
    )
    assert chosen.predicted_host_bytes == 16 * plan.model.num_parameters
    settings = settings_of_candidate(chosen, heavy)
    assert "optim.name=adamw_host" in still_open(settings, heavy)
    assert (
        read_config(
            heavy.model_dump(mode="json", exclude_defaults=True), settings
        ).config.optim.name
        == "adamw_host"
    )


def test_a_host_without_room_is_no_way_out(heavy: RunConfig, tight: MemoryLimits) -> None:
    plan = choose_plan(heavy, limits=replace(tight, host_bytes=2**20))
    assert plan.chosen is None
    same = (each for each in plan.candidates if each.result == "same")
    reasons = {
        each.reason for each in same if each.optimizer == "adamw_host" and each.micro_batch == 1
    }
    assert reasons
    for reason in reasons:
        assert re.fullmatch(
            r"needs 6\d\.\d MiB of the host's memory, where 1\.0 MiB are free", reason
        )


def test_inputs_that_wait_on_the_host_are_a_candidate_of_a_card(
    wide: Plan, tree: dict[str, Any]
) -> None:
    kept, moved = (
        next(
            each
            for each in wide.candidates
            if each.techniques == techniques and each.micro_batch == 4
        )
        for techniques in (("full",), ("full", "offload"))
    )
    assert moved.predicted_allocated_bytes < kept.predicted_allocated_bytes
    assert moved.predicted_host_bytes > kept.predicted_host_bytes == 0
    assert "model.offload_activations=true" in settings_of_candidate(moved, config(tree))
    forced = config(tree, "model.recompute=full")
    assert not any(
        choice.offloads for choice in same_choices(forced, uniform_lengths(forced), on_card=True)
    )
    assert not any(
        choice.offloads
        for choice in same_choices(config(tree), uniform_lengths(forced), on_card=False)
    )


def test_a_known_plan_needs_no_torch(wide: Plan, tree: dict[str, Any]) -> None:
    words = command(tree, "--gpu", "RTX 4090", "--format", "json")
    code = f"import sys; from fitune.cli.app import main; assert main({words!r}) == 0; assert 'torch' not in sys.modules"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(fitune.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["chosen"] == wide.chosen


def test_predict_is_the_packages_own() -> None:
    assert fitune.predict is predict


def test_an_unknown_card_is_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown card 'RTX 4091'"):
        predict(tree, gpu="RTX 4091")


def test_a_forced_candidate_is_printed_by_the_contract(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    forced = ("batch.micro=4", "batch.accumulation=1", "model.recompute=off", "loss=chunked")
    assert (
        main(command(tree, "--gpu", "RTX 4090", "--budget", "24GiB", "--format", "json", *forced))
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert set(found["model"]) == {
        *("name", "num_parameters", "num_trainable_parameters"), *("num_layers", "hidden_size", "vocab_size"),
    }  # fmt: skip
    assert set(found["device"]) == {"name", "kind", "total_bytes", "free_bytes", "context_bytes"}
    assert found["budget_bytes"] == 24 * 2**30
    assert found["data"]["max_length"] == 1024
    assert found["chosen"] == 0
    assert (found["candidates"][0]["micro_batch"], found["candidates"][0]["accumulation"]) == (4, 1)
    for candidate in found["candidates"]:
        assert set(candidate) == CANDIDATE_KEYS


def test_what_fits_nowhere_exits_with_3_and_says_what_is_large(
    wide: Plan, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tree, "--gpu", "RTX 4090", "--budget", "301MiB", "--format", "json")) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["chosen"] is None
    assert "no plan fits 301.0 MiB on RTX 4090: the closest candidate" in err
    assert "Try" in err


def test_where_nothing_fits_the_closest_is_what_is_shown(
    wide: Plan, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tree, "--gpu", "RTX 4090", "--budget", "301MiB")) == 3
    out, err = capsys.readouterr()
    least = min(each.predicted_device_bytes for each in wide.candidates if each.result == "same")
    shown = re.search(r"= device +nvidia-smi will show +([\d.]+)", out)
    assert shown
    assert float(shown[1]) <= float(format_gib(least + SEGMENT_BYTES))
    assert "what others say of the closest one" in out
    plan = choose_plan(config(tree, "memory.budget=301MiB"), gpu="RTX 4090")
    assert plan.others[0].predicted_bytes == closest(plan).predicted_allocated_bytes
    enough = re.search(r"a memory\.budget of ([\d.]+) MiB$", err.rstrip())
    assert enough
    assert abs(float(enough[1]) * 2**20 - least) <= SEGMENT_BYTES


def test_a_budget_beyond_the_card_is_cut_to_it_and_no_way_out(
    heavy: RunConfig, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tree["model"] = {"source": heavy.model.source}
    tree["data"] |= {"max_length": 2**13}
    forced = ("batch.micro=4", "model.recompute=off", "loss=full", "model.method=lora")
    assert main(command(tree, "--gpu", "RTX 4060", "--budget", "200GiB", *forced)) == 3
    out, err = capsys.readouterr()
    free = format_bytes(find_device("RTX 4060").total_bytes)
    assert "memory limit 200.0 GiB, more than there is: what is free counts" in out
    assert f"no plan fits {free} on RTX 4060" in err
    assert "or a card with" in err
    assert "a memory.budget of" not in err


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_stays_within_the_screen(
    wide: Plan,
    tree: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    language: str,
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FITUNE_LANG", language)
    assert main(command(tree, "--gpu", "RTX 4090", "--format", "human", "--all")) == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if "max_memory_allocated" in line)
    table = [line for line in lines[start - 10 :] if re.search(r"\d[*]? +\d+ x \d|─", line)]
    assert len(table) >= len(wide.candidates)
    assert max(map(cell_len, table)) <= columns
    assert all(re.search("same|相同|close|相近|different|不同|─", line) for line in table)


@pytest.mark.parametrize(
    ("kind", "last"), [("cuda", "nvidia-smi will show"), ("cpu", "the process in all")]
)
def test_the_sums_are_called_what_the_device_calls_them(
    wide: Plan, kind: Literal["cuda", "cpu"], last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_LANG", "en")
    screen = Console(file=io.StringIO(), width=100)
    show_plan(replace(wide, device=replace(wide.device, kind=kind)), screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert last in text
    assert ("cuda" in text) == (kind == "cuda")


def test_the_configuration_of_a_candidate_can_be_printed(
    wide: Plan, tree: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    number = next(i for i, each in enumerate(wide.candidates) if each.recompute == "selective")
    assert main(command(tree, "--gpu", "RTX 4090", "--all", "--apply", str(number))) == 0
    (tmp_path / "applied.yaml").write_text(capsys.readouterr().out)
    applied = read_config(tmp_path / "applied.yaml").config
    wanted = wide.candidates[number]
    assert (applied.model.recompute, applied.batch.micro_tokens) == (
        wanted.recompute,
        wanted.micro_tokens,
    )
    assert applied.batch.rows_per_step == 4


def test_a_model_alone_can_be_planned_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "data.max_length=1024",
        "batch.effective=4",
        "model.recompute=off",
        "loss=chunked",
        "--gpu",
        "RTX 4090",
    ]
    assert main(["plan", f"{model}/config.json", *words, "--format", "quiet"]) == 0
    assert capsys.readouterr().out.strip() in [
        f"batch.micro_tokens={1024 * rows}" for rows in (1, 2, 4)
    ]


def test_a_candidate_has_one_number_in_the_table_in_json_and_for_apply(wide: Plan) -> None:
    assert wide.chosen is not None
    page = io.StringIO()
    show_plan(wide, Screen(file=page, width=100), every=True)
    (marked,) = [
        line.split()[0] for line in page.getvalue().splitlines() if re.match(r" *\d+\* ", line)
    ]
    assert marked == f"{wide.chosen}*"
    assert plan_json(wide)["chosen"] == wide.chosen
    assert _candidate(wide, wide.chosen, every=True) is wide.candidates[wide.chosen]


class ByRows(Drawn):
    """Memory as the tokens at once, a fifth of it with recomputation; larger micro-batches are faster."""

    def forecast(self, choice: Choice) -> Any:
        tokens = (choice.micro_tokens or 0) * (1 if choice.recompute == "off" else 0.2)
        fits = tokens <= self.limits.limit_bytes
        return SimpleNamespace(
            fits=fits, precision="bfloat16", allocated_bytes=tokens, context_bytes=0
        )

    def seconds(self, choice: Choice, *, bound: Bound | None = None) -> float:
        return (1.0 if choice.recompute == "off" else 1.3) + 1 / (choice.micro_tokens or 1)


@pytest.mark.parametrize(("limit", "expected"), [(2500, ("off", 2048)), (900, ("every_4", 4096))])
def test_what_would_change_the_result_is_shown_at_its_fastest_setting_that_fits(
    limit: int, expected: tuple[str, int]
) -> None:
    search = ByRows([(1.0, 1)] * 99, limit).search()
    fastest = min(search.choices, key=search.order)
    assert not search.fits(fastest)
    chosen = min((each for each in search.choices if search.fits(each)), key=search.order)
    found = search.best_proposals(fastest, chosen)
    assert {each.method or each.optimizer for each in found} == {
        "adamw_8bit",
        "adafactor",
        "lora",
        "qlora",
    }
    assert {(each.recompute, each.micro_tokens) for each in found} == {expected}


@given(st.integers(100, 20_000))
def test_what_cannot_fit_is_left_out_of_a_brief_plan_and_changes_no_choice(limit: int) -> None:
    whole, short = (ByRows([(1.0, 1)] * 99, limit).search() for _ in range(2))
    fitting = [choice for choice in [*whole.choices, *whole.on_host] if whole.fits(choice)]
    best = min((whole.order(choice)[0] for choice in fitting), default=None)
    found = short.lean()
    assert (None if found is None else short.order(found)[0]) == best
    too_large = [choice for choice in short.looked_at if not short.looked_at[choice].fits]
    assert (
        len({choice.variant for choice in too_large if choice.loss == "full"}) == 0 or limit >= 1024
    )


def test_the_first_answer_comes_before_the_rest(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("FITUNE_LANG", "en")
    told: list[Any] = []
    own = config(tree, "batch.micro=2")
    plan = choose_plan(
        own, gpu="RTX 4090", search="brief", on_stage=told.append, on_first=told.append
    )
    (answer,) = [each for each in told if isinstance(each, FirstAnswer)]
    assert told.index(answer) < len(told) - 1
    assert plan.configured is not None
    same = plan.candidates[plan.configured]
    assert answer.is_configured
    assert answer.device_bytes == same.predicted_device_bytes
    assert (answer.sizes.product, answer.fits) == ("2 x 2", same.fits)
    stages = [each for each in told if isinstance(each, str)]
    assert stages[:2] == ["reading the data", "loading torch and transformers"]
    assert re.fullmatch(r"recording the step: 1 of \d+", stages[2])


def test_a_plan_that_leaves_the_micro_batch_open_has_no_setting_of_its_own(wide: Plan) -> None:
    assert wide.configured is None


def test_a_way_out_names_what_changes_and_nothing_that_is_so_already(wide: Plan) -> None:
    refused = [replace(each, fits=each.result != "same") for each in wide.candidates]
    text = does_not_fit(replace(wide, candidates=tuple(refused), chosen=None))
    assert re.search(r"Try optim\.name=adamw_8bit \(.*model\.method=lora \(", text)
    assert "optim.name=adamw " not in text
    hosted = [
        replace(each, optimizer="adamw_host") if each is closest(wide) else each for each in refused
    ]
    assert "optim.name=adamw " not in does_not_fit(
        replace(wide, candidates=tuple(hosted), chosen=None)
    )


def test_a_card_that_is_named_as_a_way_out_has_room_for_its_share_too(wide: Plan) -> None:
    needed = min(each.predicted_device_bytes for each in wide.candidates)
    small = replace(wide.device, free_bytes=needed // 2, total_bytes=needed // 2)
    text = does_not_fit(
        replace(wide, device=small, budget_bytes=int(0.9 * needed // 2), chosen=None)
    )
    told = re.search(r"a card with ([\d.]+ \w+)$", text)
    assert told is not None
    assert (
        0.9 * parse_bytes(told[1].replace(" ", "")) >= 0.99 * closest(wide).predicted_device_bytes
    )


@pytest.mark.parametrize(("method", "number"), [("full", 3), ("lora", 1), ("qlora", 1)])
def test_formulas_of_full_training_do_not_stand_beside_adapters(method: str, number: int) -> None:
    found = other_estimates(
        dict.fromkeys(CATEGORIES, 1), num_parameters=1, method=method, precision="float32", recompute="off",
        positions=1, hidden_size=1, num_layers=1,
    )  # fmt: skip
    assert len(list(found)) == number


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_number_of_no_candidate_is_refused_with_those_there_are(wide: Plan, number: int) -> None:
    with pytest.raises(UsageError, match=f"give 0 to {len(wide.candidates) - 1}"):
        _candidate(wide, number, every=True)


def test_a_model_alone_needs_nothing_beside_it(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{model}/config.json", "--gpu", "RTX 4090", "--apply", "0"]) == 0
    out, err = capsys.readouterr()
    assert read_config(yaml.safe_load(out)).config.model.source == model
    assert "data.train is 'none' in it: put your data there before you train" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["minimindd2"], "did you mean minimind2"),
        (["minimind2", "--gpu", "RTX 4900"], "did you mean RTX 4090"),
        (
            ["minimind2", "--model", "minimind-3"],
            "minimind2 and --model minimind-3 are two models: give one of them",
        ),
        (["--gpu", "RTX 4090"], "nothing to work on"),
        (
            ["minimind2", "--splits", "6x1", "--apply", "1", "--measure"],
            "drop --measure and --apply",
        ),
        (
            ["minimind2", "--apply", "1", "--measure"],
            "--apply prints a configuration and nothing else: drop --measure",
        ),
        (["minimind2", "--apply", "1", "--format", "json"], "drop --format"),
        (
            ["--trainer", "a:b", "--budget", "1GiB"],
            "--trainer predicts a Trainer as it is: drop --memory-limit",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_rows_longer_than_the_models_positions_are_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TINY["gpt2"].save_pretrained(tmp_path)
    positions = TINY["gpt2"].n_positions
    words = [str(tmp_path), f"data.max_length={2 * positions}", "--gpu", "RTX 4090"]
    assert main(["plan", *words]) == 2
    assert f"set data.max_length={positions}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="positions"):
        predict(
            {
                "model": {"source": str(tmp_path)},
                "data": {"train": "none", "max_length": 2 * positions},
            }
        )


def test_splits_are_compared_and_the_rate_is_advised(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    forced = ("model.recompute=off", "loss=chunked")
    assert main(command(tree, "--gpu", "RTX 4090", "--splits", "1x1,1x4,4x1", *forced)) == 0
    out = capsys.readouterr().out
    assert "1 x 4, 4 x 1 are one training of 4 samples a step" in out
    assert (
        "4 samples a step instead of 1: at most 2 times the learning rate (4e-05 for 2e-05)" in out
    )


def test_splits_are_advised_the_rate_of_the_measured_noise(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    forced = ("model.recompute=off", "loss=chunked", "optim.lr=3e-5")
    known = ("optim.scaling=sqrt_gain", "optim.reference_batch=1", "optim.noise_scale=4")
    assert main(command(tree, "--gpu", "RTX 4090", "--splits", "1x1,1x4", *forced, *known)) == 0
    assert (
        "sqrt_gain from 1 sample to 4, noise scale 4 samples: rate 3e-05 -> 4.74e-05"
        in capsys.readouterr().out
    )


def test_a_list_of_splits_that_cannot_be_read_is_refused(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tree, "--splits", "6by4")) == 2
    assert "write it like 6x1,6x4,4x6" in capsys.readouterr().err


def test_memory_that_others_hold_is_no_part_of_the_limit(tree: dict[str, Any]) -> None:
    limits = find_limits(config(tree, "memory.budget=20GiB").memory, gpu="RTX 4090")
    taken = replace(limits, device=replace(find_device("RTX 4090"), free_bytes=5 * 2**30))
    assert taken.limit_bytes == 5 * 2**30


def test_without_data_every_row_is_as_long_as_the_longest(tree: dict[str, Any]) -> None:
    assert uniform_lengths(config(tree)).sample_tokens == (1024,)


FORCED = ("batch.micro=2", "model.recompute=off", "loss=chunked", "optim.name=sgd")


def test_real_steps_stand_beside_the_prediction(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tree, "--measure", "--format", "json", *FORCED)) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["num_steps"] == 3
    assert measured["measured_seconds_per_step"] > 0
    assert measured["measured_reserved_bytes"] > 0


def test_another_card_cannot_be_measured_here(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tree, "--measure", "--gpu", "RTX 4090", *FORCED)) == 2
    assert (
        "--measure runs on this machine, and the plan is for RTX 4090: leave out --gpu"
        in capsys.readouterr().err
    )


# --- the second process ------------------------------------------------------------------------------------------


def test_one_process_and_two_make_the_same_plan(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = config(tree, "batch.effective=2", "model.recompute=full", "model.method=lora")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "one"))
    alone = choose_plan(few, gpu="RTX 4090", search="brief")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "two"))
    assert choose_plan(few, gpu="RTX 4090", search="brief") == alone


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.mark.usefixtures("two_cores")
def test_two_processes_do_every_part_once(tmp_path: Path) -> None:
    parts = [tmp_path / str(number) for number in range(40)]

    def note(part: Path) -> int:
        time.sleep(0.001)
        with part.open("x") as file:  # refuses a second time
            file.write(str(os.getpid()))
        return os.getpid()

    other = divide(parts, here=note, in_copy=note)
    assert other not in (None, os.getpid())
    assert {int(part.read_text()) for part in parts} == {other, os.getpid()}


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "fail", [lambda: 1 / 0, lambda: os._exit(9), lambda: os.kill(os.getpid(), signal.SIGKILL)]
)
def test_a_second_process_that_fails_brings_none(fail: Callable[[], Any]) -> None:
    assert divide([1, 2, 3], here=lambda _: time.sleep(0.1), in_copy=lambda _: fail()) is None


@pytest.mark.usefixtures("two_cores")
def test_what_fails_here_ends_the_second_process_too() -> None:
    with pytest.raises(ZeroDivisionError):
        divide([0, 0], here=lambda part: 1 // part, in_copy=lambda _: time.sleep(1000))
    assert not multiprocessing.active_children()


def test_one_core_does_every_part_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    done: list[int] = []
    assert divide([1, 2, 3], here=done.append, in_copy=done.append) is None
    assert done == [1, 2, 3]


def test_a_notebook_shows_the_table_and_runs_nothing_of_it(wide: Plan) -> None:
    hostile = replace(wide, model=replace(wide.model, name="<script>alert(1)</script>"))
    page = hostile._repr_html_()
    assert page.startswith("<pre")
    assert "micro-batch x accumulation" in page
    assert "<script" not in page


# --- mixtures of experts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that calls its experts with the tokens that each of them gets. All is forced but what may be proposed."""
    directory = tmp_path_factory.mktemp("one_by_one")
    TINY_DBRX.save_pretrained(directory)
    return {
        "model": {
            "source": str(directory),
            "method": "qlora",
            "precision": "bfloat16",
            "recompute": "off",
        },
        "data": {"train": "missing.jsonl", "max_length": 64},
        "optim": {"name": "sgd"},
        "batch": {"effective": 4, "micro": 4},
        "loss": "full",
    }


@pytest.fixture(scope="module")
def routed(one_by_one: dict[str, Any]) -> dict[str, Plan]:
    plans = {}
    for routing in ("balanced", "worst"):
        plans[routing] = choose_plan(
            config(one_by_one, f"memory.routing={routing}"), gpu="RTX 4090"
        )
    return plans


def test_all_tokens_at_the_same_experts_need_more_than_tokens_spread_evenly(
    routed: dict[str, Plan],
) -> None:
    balanced, worst = (plan.candidates[0].predicted_allocated_bytes for plan in routed.values())
    assert balanced < worst


@pytest.mark.parametrize(("routing", "other"), [("balanced", "worst"), ("worst", "balanced")])
def test_a_plan_names_its_routing_and_what_the_other_would_need(
    routed: dict[str, Plan], routing: str, other: str
) -> None:
    screen = Console(file=io.StringIO(), record=True, width=100)
    show_plan(routed[routing], screen)
    shown = screen.export_text()
    needed = format_bytes(routed[other].candidates[0].predicted_allocated_bytes)
    assert ROUTED[routing] in shown
    assert f"memory.routing={other}: the marked one would have {needed} allocated" in shown


def test_a_prediction_says_that_its_interval_spans_both_routings(
    one_by_one: dict[str, Any],
) -> None:
    interval = predict(one_by_one, gpu="RTX 4090").device_interval
    assert interval is not None
    assert interval.reasons[-1].startswith("tokens go to the experts evenly or all to the same")


def test_the_worst_routing_of_grouped_experts_is_said_to_change_nothing(tmp_path: Path) -> None:
    TINY["mixtral"].save_pretrained(tmp_path)
    tree = {
        "model": {"source": str(tmp_path)},
        "data": {"train": "missing.jsonl", "max_length": 64},
    }
    balanced, worst = (
        predict({**tree, "memory": {"routing": name}}, gpu="RTX 4090") for name in ROUTED
    )
    assert sorted(worst.assumptions) == sorted((*balanced.assumptions, UNROUTED))
    assert replace(worst, assumptions=()) == replace(balanced, assumptions=())


# --- the committed benchmark -------------------------------------------------------------------------------------


def test_the_plans_that_were_measured_are_near_the_fastest_and_stand_in_the_docs() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "plan.md").read_text(encoding="utf-8")
    models = json.loads((root / "benchmarks" / "results" / "plan.json").read_text())["models"]
    assert len(models) == 4
    for name, model in models.items():
        runs = model["runs"]
        assert len(runs) == 3
        assert all(
            run["exit_code"] == 0 and run["num_ooms"] == 0 and run["slower"] < 0.1 for run in runs
        )
        slower = ", ".join(f"{100 * run['slower']:+.1f} %" for run in runs)
        assert f"| {name} | {model['rank_correlation']:.3f} | {slower} | 0 |" in page
