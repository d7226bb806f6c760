"""What a person reads of a plan: the answer first, then four settings, and where the others are."""

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.output import Screen
from fitune.cli.plan_table import first_answer_text, show_plan
from fitune.config import read_config
from fitune.planning.optimizer_facts import Span
from fitune.planning.plan import FirstAnswer, Plan, closest, sizes_of, split_of
from fitune.planning.plan_text import about_seconds, highlighted_settings
from fitune.planning.search import choose_plan
from tiny_models import TINY


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "en")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    TINY["llama"].save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def open_plan(model: str) -> Plan:
    """Of a configuration that leaves the split open."""
    return plan_of(model)


def plan_of(model: str, *overrides: str) -> Plan:
    tree: dict[str, Any] = {
        "model": {"source": model},
        "data": {"train": "none", "max_length": 1024},
        "batch": {"effective": 16},
    }
    config = read_config(tree, overrides).config
    return choose_plan(config, gpu="RTX 4090", search="brief")


def shown(plan: Plan, *, width: int = 100, **options: Any) -> list[str]:
    page = io.StringIO()
    show_plan(plan, Screen(file=page, width=width), **options)
    return page.getvalue().splitlines()


@pytest.mark.parametrize(
    ("micro_batch", "num_samples", "product"),
    [
        (6, 24, "6 x 4"),
        (6, 16, "6 + 6 + 4"),
        (5, 24, "5 + 5 + 5 + 5 + 4"),
        (3, 1000, "3 x 333 + 1"),
        (4, 4, "4 x 1"),
        (8, 4, "8 x 1"),
    ],
)
def test_a_split_is_written_as_the_sizes_it_makes(
    micro_batch: int, num_samples: int, product: str
) -> None:
    sizes = sizes_of(micro_batch, micro_batch * 512, 99, num_samples=num_samples, is_uniform=True)
    assert sizes.product == product


def test_a_split_by_tokens_is_written_in_tokens() -> None:
    sizes = sizes_of(4, 8192, 3, num_samples=16, is_uniform=False)
    assert (sizes.product, sizes.sentence) == (
        "8,192 tokens x 3",
        "micro-batch of 8,192 tokens, accumulation 3",
    )


def test_the_first_line_is_the_answer(open_plan: Plan) -> None:
    assert open_plan.chosen is not None
    chosen = open_plan.candidates[open_plan.chosen]
    timed = replace(
        open_plan, training=replace(open_plan.training, length=Span(steps=10_000, tokens=1e9))
    )
    seconds = 10_000 * (chosen.predicted_seconds_per_step or 0.0)
    sentence = split_of(open_plan, chosen).sentence
    assert re.fullmatch(rf"{re.escape(sentence)}: [\d.]+ of 21\.3 GiB", shown(open_plan)[0])
    assert shown(timed)[0].endswith(f" GiB, about {about_seconds(seconds)}")
    assert "micro-batch 16, accumulation 1" in sentence


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "a second"), (80, "80 seconds"), (3000, "50 minutes"), (10_000, "3 hours")],
)
def test_a_time_is_told_in_one_unit(seconds: float, words: str) -> None:
    assert about_seconds(seconds) == words


def test_the_fastest_the_leanest_and_one_between_are_shown(open_plan: Plan) -> None:
    labels = highlighted_settings(open_plan)
    assert list(labels.values()) == ["fastest", "between", "leanest"]
    sizes = [open_plan.candidates[number].predicted_device_bytes for number in labels]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == closest(open_plan).predicted_device_bytes
    rows = [
        line for line in shown(open_plan) if re.match(r" *\d+[* ] (fastest|between|leanest) ", line)
    ]
    assert len(rows) == 3


def test_the_setting_of_the_user_comes_first(model: str) -> None:
    plan = plan_of(model, "batch.micro=6")
    labels = highlighted_settings(plan)
    assert plan.configured is not None
    assert next(iter(labels)) == plan.configured
    assert labels[plan.configured].startswith("yours")
    assert any("yours" in line and "6 + 6 + 4" in line for line in shown(plan))


def test_the_foot_names_all_once(open_plan: Plan) -> None:
    assert "\n".join(shown(open_plan)).count("--all") == 1
    assert "--all" not in "\n".join(shown(open_plan, every=True))
    assert "--all" not in open_plan._repr_html_()


def test_where_nothing_fits_the_closest_is_shown_and_what_would_fit(open_plan: Plan) -> None:
    refused = tuple(replace(each, fits=False) for each in open_plan.candidates)
    labels = highlighted_settings(replace(open_plan, candidates=refused, chosen=None))
    assert labels == {open_plan.candidates.index(closest(open_plan)): "closest"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_four_settings_stay_within_80_columns(
    open_plan: Plan, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("FITUNE_LANG", language)
    rows = [line for line in shown(open_plan, width=80) if re.match(r" *\d+[* ] ", line)]
    assert len(rows) == 3
    assert max(map(cell_len, rows)) <= 80


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rows_and_headings_fold_between_their_parts_in_a_narrow_terminal(
    model: str, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    from rich.cells import cell_len

    plan = plan_of(model, "batch.effective=1000", "batch.micro=300")
    monkeypatch.setenv("FITUNE_LANG", language)
    page = io.StringIO()
    show_plan(plan, Screen(file=page, width=80, force_terminal=True, color_system=None))
    lines = page.getvalue().splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 80
    starts = [line[:9].strip() for line in lines[2 : lines.index("", 2)]]
    assert len(starts) > 4
    assert set(starts[-2:]) == {""}
    rows = [number for number, line in enumerate(lines) if re.match(r" *\d+[* ] ", line)]
    column = lines[rows[1]].index("300 + 300")
    assert lines[rows[1] + 1].strip() == "offload"
    assert cell_len(lines[rows[1] + 1].split("offload")[0]) == cell_len(lines[rows[1]][:column])
    if language == "en":
        assert [line.split("  GiB")[0].strip() for line in lines[rows[0] - 3 : rows[0] - 1]] == [
            "micro-batch x accumulation,",
            "gradient checkpointing",
        ]


@pytest.mark.parametrize(
    ("configured", "fits"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_the_first_answer_says_whether_it_fits(configured: bool, fits: bool) -> None:
    answer = FirstAnswer(
        is_configured=configured,
        sizes=sizes_of(6, None, 4, num_samples=24, is_uniform=True),
        recompute="off",
        device_bytes=10 * 2**30,
        limit_bytes=12 * 2**30,
        fits=fits,
    )
    sentence = first_answer_text(answer)
    assert ("your setting" in sentence) == configured
    assert ("not fit" in sentence) == (not fits)
    assert "micro-batch 6, accumulation 4" in sentence
    assert "10.0 of 12.0 GiB" in sentence


LOOK = """
import sys
from fitune.cli.app import main
code = main(sys.argv[1:])
print(code, "torch" in sys.modules or "transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "./nowhere"], "does not exist"),
        (["plan", "nobody/nothing"], "is not cached and the hub cannot be reached"),
        (["train", "--model", "MODEL", "--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
        (["train", "--model", "./nowhere", "--data", "nowhere.jsonl"], "does not exist"),
        (["train", "--model", "minimind2", "--data", "nowhere.jsonl"], "carries no tokenizer"),
        (["check", "nowhere.jsonl", "--model", "MODEL"], "no data at nowhere.jsonl"),
        (["plan", "minimind2", "optim.rate=3"], "unknown key 'optim.rate'"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_imported(
    words: list[str], told: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    arguments = [str(model) if word == "MODEL" else word for word in words]
    environment = {
        "PATH": "",
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://hub.invalid",
        "FITUNE_LANG": "en",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert done.stdout.split() == ["2", "False"]
    assert told in done.stderr
