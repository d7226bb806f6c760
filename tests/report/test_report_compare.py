"""`fitune compare` and `advise`: what is said of runs whose truth is known."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.board.offline import offline_page as page
from fitune.cli.app import main
from fitune.report.advice import advise
from fitune.report.compare import Comparison, compare
from fitune.report.tables import cells
from fitune.report.verdicts import verdicts
from fitune.run.directory import RunDirectory
from fitune.run.files import write_json
from written_runs import GIB, Recipe, three_configurations, write_run


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("three")
    three_configurations(directory)
    return directory


@pytest.fixture(scope="module")
def comparison(three: Path) -> Comparison:
    return compare([three / name for name in ("6x1", "6x4", "4x6")])


def test_losses_are_compared_where_all_have_seen_the_same_tokens(tmp_path: Path) -> None:
    short = write_run(tmp_path, "short", Recipe(steps=20))
    long = write_run(tmp_path, "long", Recipe(steps=40))
    found = compare([short, long])
    assert found.tokens == 20 * 24 * 100
    assert found.rows[1].eval_loss == pytest.approx(
        1.9 + 0.5
    )  # half way down its own straight line


def test_splits_of_one_batch_are_told_to_be_the_same_run(comparison: Comparison) -> None:
    (check,) = comparison.checks
    assert (check.first, check.second, check.num_steps) == ("6x4", "4x6", 40)
    assert check.same
    assert any(
        "are the same run" in sentence and "4x6 takes 6.0 GiB less" in sentence
        for sentence in verdicts(comparison)
    )


def test_splits_whose_curves_part_are_not_called_the_same(tmp_path: Path) -> None:
    one = write_run(tmp_path, "one", Recipe())
    other = write_run(tmp_path, "other", Recipe(micro=4, accumulation=6, noise=0.1))
    found = compare([one, other])
    assert not found.checks[0].same
    assert any("should be the same training, but" in sentence for sentence in verdicts(found))


@pytest.mark.parametrize(
    "changed", [{"lr": 1e-4}, {"accumulation": 2}, {"settings": {"model": {"method": "lora"}}}]
)
def test_another_rate_batch_or_method_is_another_run(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    one = write_run(tmp_path, "one", Recipe())
    other = write_run(tmp_path, "other", replace(Recipe(micro=6), **changed))  # type: ignore[arg-type]
    assert compare([one, other]).checks == ()


def test_only_the_keys_that_differ_are_shown(comparison: Comparison) -> None:
    assert dict(comparison.differing) == {
        "batch.accumulation": (1, 4, 6),
        "batch.micro": (6, 6, 4),
        "optim.lr": (3e-5, 6e-5, 6e-5),
    }


def test_a_real_difference_has_an_interval_without_zero_and_splits_of_a_batch_have_one_with_it(
    comparison: Comparison, three: Path
) -> None:
    large = comparison.rows[1].eval_difference
    assert large is not None
    assert large.excludes_zero
    assert large.low < -0.0476 < large.high
    same = compare([three / "6x4", three / "4x6"]).rows[1].eval_difference
    assert same is not None
    assert not same.excludes_zero


def test_the_pareto_set_counts_ties_within_noise_as_equal(comparison: Comparison) -> None:
    assert [row.name for row in comparison.rows if row.on_front] == [
        "6x4",
        "4x6",
    ]  # faster, and smaller


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8
    )
)
def test_the_pareto_set_is_never_empty_and_nothing_outside_it_is_best(
    shape: list[tuple[int, int, int]],
) -> None:
    from fitune.report.compare import ComparedRun, _with_front
    from fitune.report.run_on_disk import (
        EVAL_COLUMNS,
        MEMORY_COLUMNS,
        TRAIN_COLUMNS,
        RecordedRun,
        make_curve,
    )

    rows = []
    for index, (peak, speed, loss) in enumerate(shape):
        run = RecordedRun(
            name=str(index), path=str(index), origin="fitune", state="finished", settings={}, summary={},
            train=make_curve(TRAIN_COLUMNS, [{"step": 1}]), evals=make_curve(EVAL_COLUMNS, []),
            memory=make_curve(MEMORY_COLUMNS, []),
        )  # fmt: skip
        rows.append(
            ComparedRun(
                run=run, effective_batch=1, split="", lr=None, predicted_bytes=None, measured_bytes=None,
                run_peak_bytes=peak, tokens_per_second=float(speed), seconds=None, train_loss=None,
                eval_loss=float(loss), train_difference=None, eval_difference=None,
            )
        )  # fmt: skip
    front = [row for row in _with_front(rows, None) if row.on_front]
    assert front
    assert min(row.run_peak_bytes or 0 for row in rows) in [row.run_peak_bytes for row in front]
    assert min(row.eval_loss or 0 for row in rows) in [row.eval_loss for row in front]


def with_summary(run: Path, **changes: object) -> Path:
    summary = RunDirectory(run).summary
    write_json(summary, json.loads(summary.read_text()) | changes)
    return run


def test_the_peak_is_that_of_the_whole_run_and_the_prediction_stands_beside_its_step(
    tmp_path: Path,
) -> None:
    whole = with_summary(write_run(tmp_path, "whole", Recipe()), peak_reserved_bytes=21 * GIB)
    resumed = with_summary(
        write_run(tmp_path, "resumed", Recipe()),
        measured_reserved_bytes=8 * GIB,
        peak_reserved_bytes=20 * GIB,
    )
    found = compare([whole, resumed])
    assert [row.peak_bytes for row in found.rows] == [21 * GIB, 20 * GIB]
    assert [cells(row)[3] for row in found.rows] == ["21.00", "20.00"]
    said = "\n".join(verdicts(found))
    assert "whole 21.0 GiB, resumed 20.0 GiB" in said
    assert "resumed 10.0 GiB, 8.0 GiB (+25.0%)" in said


def test_the_steps_after_the_last_save_of_a_run_that_died_count(tmp_path: Path) -> None:
    died = with_summary(
        write_run(tmp_path, "died", Recipe(peak_bytes=12 * GIB)), peak_reserved_bytes=GIB
    )
    assert compare([died]).rows[0].peak_bytes == 12 * GIB


def test_peaks_of_two_kinds_are_not_judged_against_each_other(tmp_path: Path) -> None:
    full = with_summary(write_run(tmp_path, "full", Recipe()), peak_device_bytes=15 * GIB)
    bare = with_summary(write_run(tmp_path, "bare", Recipe()), peak_device_bytes=14 * GIB)
    lines = [json.loads(line) for line in RunDirectory(bare).metrics.read_text().splitlines()]
    peaks = {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
    RunDirectory(bare).metrics.write_text(
        "".join(json.dumps(line | peaks if "loss" in line else line) + "\n" for line in lines)
    )
    found = compare([full, bare])
    assert [row.peak_bytes for row in found.rows] == [15 * GIB, 14 * GIB]
    assert "the peaks are of what all tell, device" in " ".join(found.notes)


@pytest.mark.parametrize("tokens", ["0", "-5", "nan"])
def test_there_is_no_comparing_before_the_first_token(
    tokens: str, three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(three / "6x1"), "--at", tokens]) == 2
    assert "give more than 0 with --at" in capsys.readouterr().err


def test_what_accumulation_gained_and_which_rate_was_right_is_said(
    tmp_path: Path, three: Path
) -> None:
    hot = write_run(
        tmp_path, "hot", Recipe(lr=1.2e-4, row_losses=[2.3 + 0.01 * i for i in range(200)])
    )
    said = "\n".join(verdicts(compare([three / "6x1", three / "4x6", hot])))
    assert "from 6 to 24 samples a step (6x1 to 4x6)" in said
    assert "with 24 samples a step the best rate tried is 6e-05" in said
    assert "beside it: 0.00012 +" in said


@pytest.mark.parametrize(
    ("noise_rows", "rate"), [(12, "4.2e-05"), (24, "4.7e-05"), (100, "5.5e-05"), (400, "5.9e-05")]
)
def test_the_measured_noise_says_which_rate_a_larger_batch_may_take(
    noise_rows: int, rate: str, tmp_path: Path
) -> None:
    small = write_run(tmp_path, "6x1", Recipe(accumulation=1, lr=3e-5, noise_ratio=noise_rows / 6))
    large = write_run(
        tmp_path, "6x4", Recipe(noise_ratio=0.1)
    )  # at equal tokens it has come less far
    said = "\n".join(verdicts(compare([small, large])))
    assert (
        f"the noise scale of 6x1 is {noise_rows} samples: from 6 to 24 samples a step it allows"
        in said
    )
    assert f"so {rate} for 3e-05; however noisy, 2 times at most" in said


def test_of_two_runs_of_the_smallest_batch_the_one_with_pairs_tells_the_noise(
    tmp_path: Path,
) -> None:
    alone = write_run(tmp_path, "6x1", Recipe(accumulation=1, lr=3e-5, noise_ratio=1e6))
    paired = write_run(tmp_path, "3x2", Recipe(micro=3, accumulation=2, lr=3e-5, noise_ratio=4.0))
    large = write_run(tmp_path, "24x1", Recipe(micro=24, accumulation=1))
    assert "the noise scale of 3x2 is 24 samples" in "\n".join(
        verdicts(compare([alone, paired, large]))
    )


@pytest.mark.parametrize(
    "settings", [{}, {"train": {"batch_mode": "follow"}}], ids=["unmeasured", "growing"]
)
def test_without_a_noise_scale_no_rate_is_derived_from_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    noise_ratio = 1.0 if settings else None
    small = write_run(
        tmp_path, "6x1", Recipe(accumulation=1, lr=3e-5, noise_ratio=noise_ratio, settings=settings)
    )
    large = write_run(tmp_path, "6x4", Recipe(noise_ratio=noise_ratio, settings=settings))
    assert "noise scale" not in "\n".join(verdicts(compare([small, large])))


def test_runs_of_other_data_or_seed_are_noted(tmp_path: Path) -> None:
    one = write_run(tmp_path, "one", Recipe())
    other = write_run(tmp_path, "other", Recipe(settings={"train": {"seed": 1}}))
    summary = RunDirectory(other).summary
    summary.write_text(summary.read_text().replace('"data_hash": "d"', '"data_hash": "e"'))
    notes = " ".join(compare([one, other]).notes)
    assert "different data" in notes
    assert "different seeds" in notes


def test_a_report_can_be_compared_again(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(comparison))
    again = compare([path])
    for before, after in zip(comparison.rows, again.rows, strict=True):
        assert after.name == before.name
        assert after.measured_bytes == before.measured_bytes
        assert after.run_peak_bytes == pytest.approx(before.run_peak_bytes)
        assert after.eval_loss == pytest.approx(before.eval_loss, abs=1e-4)
        assert after.on_front == before.on_front
    assert again.checks[0].max_difference == pytest.approx(
        comparison.checks[0].max_difference, rel=1e-3
    )


def test_a_run_that_goes_on_can_be_compared(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run", Recipe())
    metrics = RunDirectory(path).metrics
    metrics.write_text(metrics.read_text() + '{"step": 41, "lo')
    (row,) = compare([path]).rows
    assert row.run.num_steps == 40


def test_the_command_speaks_json_csv_and_markdown(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(three / name) for name in ("6x1", "6x4")]
    assert main(["compare", *runs, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == 1
    assert content["runs"][0]["measured_bytes"] == 20 * GIB
    assert content["runs"][1]["eval_difference"]["high"] < 0
    assert main(["compare", *runs, "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["optim.lr"] for line in lines] == ["3e-05", "6e-05"]
    assert main(["compare", *runs, "--md"]) == 0
    assert "| 6x1 | 6 x 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_cuts_no_number(
    three: Path, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    from fitune.cli.compare import show_comparison
    from fitune.cli.output import console

    screen = console()
    screen.width = width
    show_comparison(compare([three / name for name in ("6x1", "6x4", "4x6")]), screen)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    for text in ("14.00", "20.00", "-0.048 ±0.003", "1.984", "1.937", "1,050"):
        assert text in shown


def test_what_is_no_run_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("<p>nothing</p>")
    for name in ("empty", "missing", "page.html"):
        assert main(["compare", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["compare"]) == 2


def test_tokens_that_no_run_reached_are_refused(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(three), "--at", "24M"]) == 2
    assert "at most 96,000" in capsys.readouterr().err


def test_comparing_starts_without_torch(three: Path) -> None:
    code = (
        "import sys; from fitune.cli.app import main; main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'matplotlib'} & sys.modules.keys())"
    )
    source = Path(__file__).parents[2] / "src"
    result = subprocess.run(
        [sys.executable, "-c", code, "compare", str(three), "--format", "quiet"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(source), "FITUNE_LANG": "en"},
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "set()"


def test_fitune_compare_is_public_and_shows_itself_in_a_notebook(three: Path) -> None:
    import fitune

    shown = fitune.compare([three / "6x4", three / "4x6"])._repr_html_()
    assert "<table>" in shown
    assert "6x4 and 4x6 are the same run" in shown


# advice


def test_the_split_that_takes_less_is_advised_with_its_evidence(comparison: Comparison) -> None:
    row = next(row for row in comparison.rows if row.name == "6x4")
    first = advise(row.run, comparison)[0]
    assert (first.effect_on_result, first.bytes_saved) == ("same", 6 * GIB)
    assert first.command.endswith("batch.micro=4 batch.effective=24 batch.accumulation=auto")
    assert "4x6" in first.evidence


def test_a_better_run_is_advised_with_its_interval(comparison: Comparison) -> None:
    found = [
        each
        for each in advise(comparison.rows[0].run, comparison)
        if each.effect_on_result == "different"
    ]
    assert "optim.lr=6e-05" in found[0].command
    assert "95 %" in found[0].evidence


def advice_of(run: Path) -> str:
    found = compare([run])
    return "\n".join(
        f"{each.change}: {each.evidence} [{each.command}]"
        for each in advise(found.rows[0].run, found)
    )


def test_a_run_in_order_gets_no_advice(tmp_path: Path) -> None:
    assert advice_of(write_run(tmp_path, "run", Recipe(steps=200))) == ""


def test_overfitting_is_answered_by_stopping_never_by_the_batch(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", Recipe(steps=200, evals=8))
    lines = []
    for line in RunDirectory(run).metrics.read_text().splitlines():
        content = json.loads(line)
        if "eval_loss" in content and content["step"] > 100:
            content["eval_loss"] = 2.4 + 0.01 * (content["step"] - 100)
        lines.append(json.dumps(content))
    RunDirectory(run).metrics.write_text("\n".join(lines) + "\n")
    said = advice_of(run)
    assert "stop at step 100" in said
    assert "train.steps=100" in said
    assert "batch" not in said.replace("no batch helps", "")


def test_a_diverged_run_is_told_to_halve_the_rate(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", Recipe(steps=200))
    metrics = RunDirectory(run).metrics
    text = metrics.read_text().splitlines()
    last = json.loads(text[199]) | {"step": 201, "total_tokens": 10**6, "loss": "nan"}
    metrics.write_text("\n".join([*text[:200], json.dumps(last)]) + "\n")
    assert "optim.lr=3e-05" in advice_of(run)


def test_clipping_of_most_steps_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", Recipe(steps=200, settings={"optim": {"clip": 0.5}}))
    assert "100% of the steps were clipped" in advice_of(run)


@pytest.mark.parametrize(
    ("steps", "noise_ratio", "clip", "advised"),
    [
        (15, None, 0.5, ["a longer run: train.epochs=7"]),
        (40, None, 0.5, ["a longer run: train.epochs=3"]),
        (40, 4.0, 0.5, ["a longer run: train.epochs=3"]),
        (40, 4.0, 2.0, ["a longer run: train.epochs=3"]),
        (40, 0.2, 2.0, ["fewer samples a step (12), or a longer run: train.epochs=3"]),
        (200, 4.0, 0.5, ["a lower rate: 3e-05, or twice the samples at the same rate"]),
        (200, 0.2, 0.5, ["a lower rate: 3e-05"]),
    ],
)
def test_rows_are_not_both_added_and_taken_away(
    steps: int, noise_ratio: float | None, clip: float, advised: list[str], tmp_path: Path
) -> None:
    recipe = Recipe(steps=steps, noise_ratio=noise_ratio, settings={"optim": {"clip": clip}})
    found = compare([write_run(tmp_path, "run", recipe)])
    assert [each.change for each in advise(found.rows[0].run, found)] == advised


def test_a_run_is_made_longer_in_the_measure_that_it_was_given(tmp_path: Path) -> None:
    for length, key in (
        ({"steps": 40}, "train.steps=100"),
        ({"tokens": 1000}, "train.tokens=2500"),
    ):
        assert f" {key}" in advice_of(
            write_run(tmp_path, "run", Recipe(settings={"train": length}))
        )


def test_the_plan_tells_what_else_fits(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", Recipe(steps=200))
    chosen = {
        "micro_batch": 6, "accumulation": 4, "recompute": "off", "optimizer": "adamw", "method": "full", "fits": True,
        "predicted_device_bytes": 20 * GIB, "predicted_seconds_per_step": 1.0,
        "categories": {"optimizer_state": 6 * GIB, "activation": 14 * GIB},
    }  # fmt: skip
    smaller = chosen | {"micro_batch": 4, "accumulation": 6, "predicted_device_bytes": 14 * GIB}
    adapter = smaller | {
        "micro_batch": 5,
        "result": "different",
        "predicted_device_bytes": 18 * GIB,
    }
    plan = {"budget_bytes": 20 * GIB, "candidates": [chosen, smaller, adapter], "chosen": 0}
    RunDirectory(run).plan.write_text(json.dumps(plan))
    said = advice_of(run)
    assert "4 x 6, gradient checkpointing off" in said
    assert "5 x 6" not in said
    assert "optim.name=adamw_8bit" in said


def test_advice_names_what_the_host_would_hold(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", Recipe(steps=200))
    chosen = {
        "micro_batch": 6, "accumulation": 4, "recompute": "off", "optimizer": "adamw", "method": "full", "fits": True,
        "predicted_device_bytes": 20 * GIB, "predicted_seconds_per_step": 1.0, "offload_activations": False,
    }  # fmt: skip
    moved = {"predicted_device_bytes": 14 * GIB, "recompute": "full"}
    smaller = chosen | moved | {"offload_activations": True, "optimizer": "adamw_host"}
    plan = {"budget_bytes": 20 * GIB, "candidates": [chosen, smaller], "chosen": 0}
    RunDirectory(run).plan.write_text(json.dumps(plan))
    assert "model.recompute=full model.offload_activations=true optim.name=adamw_host" in advice_of(
        run
    )


def test_the_advice_command_prints_commands_that_can_be_typed(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(three / "6x4"), str(three / "4x6"), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["advice"][0]["command"].startswith(
        f"fitune train {three / '6x4' / 'config.yaml'} "
    )
    assert main(["advise", str(three / "6x4"), str(three / "4x6")]) == 0
    assert "4 x 6 instead of 6 x 4" in capsys.readouterr().out
