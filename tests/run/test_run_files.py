"""A run directory may be somebody else's: what is in it is read within bounds, and nothing is written outside of it."""

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from byte_tokenizer import byte_tokenizer
from fitune.cli.app import main
from fitune.errors import ConfigError, RunDirectoryError
from fitune.plain_files import read_plain
from fitune.report.run_on_disk import read_fitune_run
from fitune.run.directory import RunDirectory, check_place, list_runs, read_run, working_on
from fitune.run.files import write_atomically
from fitune.run.follow import RunFollower
from fitune.run.memory import MemorySample
from fitune.run.metrics import RunEvent, append_line, read_metrics
from fitune.watch.prometheus import check_prometheus, write_prometheus
from tiny_run import write_dialogues
from written_runs import Recipe, write_run

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="has neither FIFOs nor symbolic links for all"
)
FILES = ("config.yaml", "env.json", "plan.json", "data.json", "peak.json", "metrics.jsonl", "eval_rows.jsonl",
         "memory.jsonl", "events.jsonl", "summary.json", "lock")  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in pairwise("abcdefghi")
)
STRANGE: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to(path.parent.parent.parent / "outside"),
}
VERBS = (["runs", "runs"], ["watch", "plain", "--once"], ["compare", "runs/plain"], ["advise", "runs/plain"],
         ["report", "runs/plain"], ["export", "runs/plain", "--to", "hf"])  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").write_text("kept\n" * 100)
    return RunDirectory(write_run(Path("runs"), "plain", Recipe(steps=4, evals=1)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", STRANGE)
def test_no_reader_of_a_run_hangs_and_the_run_is_told_as_damaged(
    kind: str, name: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / name).unlink(missing_ok=True)
    STRANGE[kind](run.path / name)
    record = read_run(run.path)
    assert record.state == "damaged"
    assert record.fault is not None
    assert name in record.fault
    started = time.perf_counter()
    for verb in VERBS:
        assert main(verb) in (0, 2)
    assert time.perf_counter() - started < 60
    assert "Traceback" not in capsys.readouterr().err
    assert Path("outside").read_text() == "kept\n" * 100


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "journal.jsonl", "eval_rows.jsonl", "lock", "checkpoints"]
)
def test_resume_changes_nothing_outside_of_the_run(
    name: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run.path / name
    if place.is_dir():
        place.rmdir()
        Path("elsewhere").mkdir()
        place.symlink_to(Path("elsewhere").resolve())
    else:
        place.unlink(missing_ok=True)
        place.symlink_to(Path("outside").resolve())
    assert main(["train", "--resume", str(run.path)]) == 2
    assert f"{name}: it is a symbolic link" in capsys.readouterr().err
    assert Path("outside").read_text() == "kept\n" * 100


@pytest.mark.parametrize(
    "place", ["checkpoints/step-00000001/manifest.json", "last/config.json", "best/a/b"]
)
def test_resume_and_export_look_into_checkpoints_and_weights_too(
    place: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / place).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(run.path / place)
    assert main(["train", "--resume", str(run.path)]) == 2
    assert main(["export", str(run.path), "--to", "hf"]) == 2
    assert capsys.readouterr().err.count("it is a FIFO") == 2


def test_a_line_is_never_appended_through_a_link(run: RunDirectory) -> None:
    run.events.unlink(missing_ok=True)
    run.events.symlink_to(Path("outside").resolve())
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        append_line(run.events, RunEvent(time=0.0, step=0, kind="stop", message=""))
    with pytest.raises(RunDirectoryError), working_on(RunDirectory(run.path / "nowhere")):
        pass
    assert Path("outside").read_text() == "kept\n" * 100


def test_a_file_is_never_written_through_a_link_that_was_laid_in_its_way(run: RunDirectory) -> None:
    (run.path / f".report.html.{os.getpid()}").symlink_to(Path("outside").resolve())
    write_atomically(run.report, "page")
    assert run.report.read_text() == "page"
    assert Path("outside").read_text() == "kept\n" * 100


def test_a_file_larger_than_what_is_read_is_a_sentence(run: RunDirectory) -> None:
    for path in (run.metrics, run.summary):
        os.truncate(path, 2**40)  # without a block on the disk
    with pytest.raises(RunDirectoryError, match="at most"):
        read_metrics(run.metrics)
    assert read_run(run.path).state == "damaged"
    with pytest.raises(OSError, match="at most 10"):
        read_plain(run.config, most_bytes=10)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]\nmodel: &m {source: *m}\n",
        "[" * 100_000,
        "a: " + "[" + "x," * 40_000 + "x]",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
    ids=["anchors that repeat", "anchors within themselves", "nesting", "a long list", "bytes"],
)  # fmt: skip
def test_a_configuration_of_a_run_is_read_in_time_or_left_out_with_a_note(
    text: str, run: RunDirectory
) -> None:
    run.config.write_text(text, encoding="latin-1")
    started = time.perf_counter()
    recorded = read_fitune_run(run.path)
    assert time.perf_counter() - started < 30
    assert recorded.settings == {} or len(recorded.settings) < 10
    assert main(["report", str(run.path)]) == 0


def test_the_settings_of_a_run_have_the_types_that_the_configuration_gave_them(
    run: RunDirectory,
) -> None:
    run.config.write_text(yaml.safe_dump({"optim": {"lr": "x"}}).replace("x", "5e-7"))
    assert read_fitune_run(run.path).settings["optim.lr"] == 5e-7


def test_a_run_that_is_followed_stops_being_read_where_a_file_becomes_a_fifo(
    run: RunDirectory,
) -> None:
    follower = RunFollower(run)
    assert len(follower.read().steps) == 4
    run.metrics.unlink()
    os.mkfifo(run.metrics)
    assert follower.read().record.state == "damaged"


@pytest.mark.parametrize("name", ["a\nerror: b", "a\x1b[2J", "a\0b", "a\u202eb", "", ".", "a/b"])
def test_a_name_of_a_run_is_one_that_can_be_shown(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"is not the name of a directory") as caught:
        check_place(tmp_path, name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["小模型 3", "émile", "a b"])
def test_a_name_in_any_script_is_one(name: str, tmp_path: Path) -> None:
    check_place(tmp_path, name)


@pytest.mark.parametrize("kind", ["text", "link", "fifo", "directory"])
def test_the_file_for_prometheus_replaces_nothing_else(kind: str, run: RunDirectory) -> None:
    path = Path("fitune.prom")
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("mine\n")
    else:
        (path.symlink_to if kind == "link" else os.mkfifo)(
            *([Path("outside").resolve()] if kind == "link" else [path])
        )
    with pytest.raises(ConfigError, match=r"run\.prometheus"):
        check_prometheus(path)
    with pytest.raises(RunDirectoryError, match=r"run\.prometheus"):
        write_prometheus(path, "a", sample=MemorySample(time=1.0, step=1), metrics=None)
    assert kind != "text" or path.read_text() == "mine\n"


def test_its_own_file_is_written_again_and_a_name_in_it_stays_a_label(tmp_path: Path) -> None:
    path = tmp_path / "fitune.prom"
    for _ in range(2):
        check_prometheus(path)
        write_prometheus(
            path,
            'a"\nfitune_loss{run="b"} 1\\',
            sample=MemorySample(time=1.0, step=1),
            metrics=None,
        )
    assert all(
        line.startswith(("# TYPE fitune_", "fitune_")) for line in path.read_text().splitlines()
    )
    assert 'run="b"' not in path.read_text()


def test_training_is_refused_before_it_replaces_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_dialogues(tmp_path / "x.jsonl")
    code = main(["train", "--model", "minimind2", f"model.tokenizer={tmp_path / 'tokenizer'}",
                 "--data", str(tmp_path / "x.jsonl"), f"run.prometheus={tmp_path / 'thesis.tex'}",
                 f"run.output={tmp_path}", "--dry-run"])  # fmt: skip
    assert code == 2
    assert "thesis.tex exists and was not written by fitune" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwriting_a_run_removes_a_link_and_not_what_it_leads_to(run: RunDirectory) -> None:
    Path("elsewhere").mkdir()
    (Path("elsewhere") / "weights").write_text("kept")
    run.last.symlink_to(Path("elsewhere").resolve())
    write_run(Path("runs"), "plain", Recipe(steps=1, evals=1))
    assert (Path("elsewhere") / "weights").read_text() == "kept"


@pytest.fixture
def locked_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory beside the run that may not be looked into, also for who may look everywhere."""
    locked = run.path.parent / "locked"
    locked.mkdir()
    stat = Path.stat

    def refused(path: Path, **options: bool) -> os.stat_result:
        if locked.name in path.parts and path.name != locked.name:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    return locked


def test_a_directory_that_may_not_be_read_is_listed_as_such_beside_the_runs(
    locked_run: Path,
) -> None:
    first, second = list_runs(locked_run.parent)
    assert (first.run.name, first.state) == ("locked", "damaged")
    assert first.fault == "runs/locked cannot be read: Permission denied"
    assert (second.run.name, second.state) == ("plain", "finished")


@pytest.mark.parametrize(
    "verb", [["runs"], ["runs", "--format", "json"], ["watch", "--once"]], ids=" ".join
)
def test_the_verbs_over_all_runs_work_beside_it(
    verb: list[str], locked_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(verb) == 0
    assert "plain" in capsys.readouterr().out


def test_resume_latest_takes_the_latest_that_can_be_read(
    locked_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "--resume", "latest"])
    assert "locked" not in capsys.readouterr().err


def test_a_run_that_vanishes_while_runs_are_listed_is_passed_over(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> None:
        raise RunDirectoryError(f"{path} is not a directory")

    monkeypatch.setattr("fitune.run.directory.open_run", gone)
    assert [record.state for record in list_runs(run.path.parent)] == ["damaged"]
