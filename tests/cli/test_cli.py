"""The command line where nothing is wrong, and the one place where errors become exit codes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fitune
from fitune import errors
from fitune.cli.app import SCRIPT_VERB, app, main
from fitune.config import read_config
from fitune.machine.devices import find_device
from fitune.planning.optimizer_facts import unusual_rate
from fitune.run.directory import RunDirectory, create_run
from fitune.run.files import write_json
from fitune.run.metrics import Summary, summary_json
from fitune.units import GIB
from written_runs import Recipe, write_run

SOURCE = Path(__file__).parents[2] / "src"
SUMMARY = Summary(
    status="finished", steps=50_201, train_loss=1.9625, eval_loss=2.0414, tokens_per_second=38_400.0,
    peak_reserved_bytes=17_000_000_000,
)  # fmt: skip


def fresh_python(code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunDirectory]:
    monkeypatch.chdir(tmp_path)
    made = [
        create_run(Path("runs"), name)
        for name in ("minimind2-sft_2048-0007", "qwen3-0.6b-instruct-mixture-0012")
    ]
    write_json(made[0].summary, summary_json(SUMMARY))
    return made


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["env"], ["runs", "."], ["config", "schema"]]
)
def test_these_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    done = fresh_python(
        f"import sys; from fitune.cli.app import main; code = main({arguments}); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), code, file=sys.stderr)"
    )
    assert done.stderr.splitlines()[-1] == "[] 0"


def test_python_m_fitune_is_fitune() -> None:
    done = fresh_python(
        "import runpy, sys; sys.argv = ['fitune', '--version']; runpy.run_module('fitune')"
    )
    assert done.stdout.strip() == fitune.__version__


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f" {verb} " in shown for verb in app if not verb.startswith("-") and verb != SCRIPT_VERB
    )


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.FituneError("x"), 1), (errors.ConfigError(["x"]), 2), (errors.DataError("x"), 2),
        (errors.ModelError("x"), 2), (errors.RunDirectoryError("x"), 2), (errors.DoesNotFitError("x"), 3),
        (errors.OutOfMemoryError("x"), 4), (errors.RestartError("x"), 75), (errors.InterruptedRunError("x"), 130),
        (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_every_error_has_its_exit_code(
    error: BaseException,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fitune.cli.runs.list_runs", fail)
    assert main(["runs"]) == exit_code
    assert capsys.readouterr().err in ("error: x\n", "error: interrupted\n")


def test_a_traceback_is_shown_on_request_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITUNE_DEBUG", "1")
    assert main(["runs", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("debug", "shown"), [("0", False), ("1", True)])
def test_what_libraries_warn_of_is_shown_on_request_only(debug: str, shown: bool) -> None:
    code = (
        f"import os, sys, warnings; os.environ['FITUNE_DEBUG'] = '{debug}'; sys.argv = ['fitune', '--version']\n"
        "from fitune.cli.app import main; main(); warnings.warn('from a library', FutureWarning)\n"
        "print(os.environ.get('TORCH_CPP_LOG_LEVEL'), file=sys.stderr)"
    )
    said = fresh_python(code).stderr
    assert ("from a library" in said) is shown
    assert said.endswith("None\n" if shown else "ERROR\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
        "from fitune.cli.app import main; sys.exit(main(['config', 'schema']))"
    )
    done = fresh_python(code)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_flag_is_an_override_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model",
        "m",
        "--data",
        "a b",
        "--data",
        "c",
        "--lr",
        "5e-7",
        "--batch",
        "24",
        "--max-length",
        "512",
    ]
    assert main(["train", *flags, "optim.clip=2", "--print-config", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    config = shown["config"]
    assert [source["path"] for source in config["data"]["train"]] == ["a b", "c"]
    assert (config["optim"]["lr"], config["optim"]["clip"], config["batch"]["effective"]) == (
        5e-7,
        2,
        24,
    )
    assert {key for key, origin in shown["origins"].items() if origin == "command line"} == {
        "model.source", "data.train", "data.max_length", "optim.lr", "optim.clip", "batch.effective",
    }  # fmt: skip


def test_the_printed_configuration_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", "m", "--data", "a", "--seed", "7", "--print-config"]) == 0
    path = tmp_path / "sft.yaml"
    path.write_text(capsys.readouterr().out)
    assert read_config(path).config.train.seed == 7


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").write_text("model: {source: m}\ndata: {train: a}\n")
    assert main(["train", "lr=1.yaml", "--print-config"]) == 0


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "fitune configuration"


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_of_runs_cuts_no_number(
    columns: int,
    runs: list[RunDirectory],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert all(
        number in shown for number in ("50,201", "1.962", "2.041", "15.83", "38.4 k", "crashed")
    )
    assert "…" not in shown
    assert "\x1b[3" not in shown
    assert max(map(len, re.sub(r"\x1b\[\d*m", "", shown).splitlines())) <= columns


def test_runs_as_json_hold_the_summary(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    records = {record["name"]: record for record in shown["runs"]}
    assert shown["schema"] == 1
    assert records[runs[0].name]["summary"]["peak_reserved_bytes"] == 17_000_000_000
    assert records[runs[1].name]["summary"] is None


def test_quiet_runs_are_names(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--format", "quiet"]) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(run.name for run in runs)


def test_a_damaged_run_is_a_warning(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    runs[0].summary.write_text("{")
    assert main(["runs"]) == 0
    output, warnings = capsys.readouterr()
    assert warnings.startswith("warning: runs/minimind2-sft_2048-0007/summary.json")
    assert "damaged" in output


def test_each_card_is_shown_with_all_its_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = replace(
        find_device("RTX 4090"), name="NVIDIA GeForce RTX 4090", free_bytes=22 * GIB, used_bytes=GIB
    )
    monkeypatch.setattr("fitune.machine.environment.this_machine", lambda: (card,))
    assert main(["env"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "24 GB card" in line
    assert "visible · 22.0 GiB free now · 1.0 GiB used by others" in line


@pytest.mark.parametrize("output_format", ["auto", "human", "json", "quiet"])
def test_the_machine_is_shown_in_every_format(
    output_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["env", "--format", output_format]) == 0
    output, warnings = capsys.readouterr()
    assert output
    assert not warnings
    if output_format == "json":
        assert json.loads(output)["schema"] == 1


@pytest.mark.parametrize("verb", [["compare"], ["report"], ["advise"]])
def test_a_run_may_be_named_without_its_directory(
    verb: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "first", Recipe())
    assert main([*verb, "first"]) == 0
    assert "error" not in capsys.readouterr().err
    assert main([*verb, "nothing"]) == 2
    assert (
        "there is no run nothing, neither as a directory nor as a name in runs"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words", [["export", "x", "--to", "hf"], ["train", "--resume", "x"], ["train", "--replay", "x"]]
)
def test_an_export_and_a_run_that_goes_on_take_a_name_too(
    words: list[str], runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    named = [runs[0].name if word == "x" else word for word in words]
    assert main(named) != 0  # this one has no weights
    assert f"{runs[0].path}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["runs"], ["watch"], ["train", "--resume", "latest"]])
def test_before_any_run_is_said_how_one_begins(
    verb: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(verb) == 2
    assert "so there are no runs yet: 'fitune train CONFIG' begins one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["help"], "Usage: fitune COMMAND"),
        (["help", "plan"], "Usage: fitune plan"),
        (["version"], fitune.__version__),
    ],
)
def test_help_and_version_are_words_too(
    words: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert out in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["plan", "minimind2", "-gpu", "RTX 4090"],
            "-gpu: a flag of several letters begins with two dashes, --gpu",
        ),
        (
            ["plan", "minimind2", "--gpus", "RTX 4090"],
            "--gpus is how many cards; one by its name is --gpu 'RTX 4090'",
        ),
        (["train", "sft.yml"], "sft.yml does not exist: did you mean sft.yaml?"),
        (["train", "other.yaml"], "other.yaml does not exist: did you mean other.yml?"),
        (["train", "sft"], "sft does not exist: did you mean sft.yaml?"),
    ],
)
def test_what_was_meant_is_answered(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sft.yaml", "other.yml"):
        (tmp_path / name).write_text("model: {source: minimind2}\ndata: {train: a.jsonl}\n")
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lr", "method", "is_said"), [(3, "full", True), (0.02, "lora", True), (2e-4, "lora", False)]
)
def test_a_rate_that_was_surely_not_meant_is_said(lr: float, method: str, is_said: bool) -> None:
    config = read_config(
        None, ["model.source=m", "data.train=a", f"optim.lr={lr}", f"model.method={method}"]
    ).config
    assert (unusual_rate(config.optim) is not None) == is_said


def test_it_is_said_in_chinese_where_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    config = read_config(None, ["model.source=m", "data.train=a", "optim.lr=3"]).config
    assert "optim.lr 3 远高于" in str(unusual_rate(config.optim))


@pytest.mark.parametrize("words", [["--version"], ["nonsense"]])
def test_one_of_several_processes_ends_with_the_words_and_the_code_of_one_alone(
    words: list[str],
) -> None:
    """It ends without Python's teardown, which would write what is still in a buffer."""
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    alone, of_two = (
        subprocess.run(
            [sys.executable, "-m", "fitune", *words],
            env=buffered | {"PYTHONPATH": str(SOURCE), "WORLD_SIZE": size},
            capture_output=True,
            check=False,
        )
        for size in ("1", "2")
    )
    assert (of_two.returncode, of_two.stdout, of_two.stderr) == (
        alone.returncode,
        alone.stdout,
        alone.stderr,
    )
    assert of_two.stdout + of_two.stderr
