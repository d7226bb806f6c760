"""A disk that is full for a while costs a run nothing: what cannot be written waits until there is room."""

import builtins
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from disturbed_run import RUN, STEPS, Killed, assert_same, error_of, train
from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.errors import RunDirectoryError
from fitune.model.tensor_file import write_tensors
from fitune.run import patient_files
from fitune.run.metrics import RunEvent, StepMetrics, as_line, read_events, read_summary
from fitune.run.patient_files import PatientFiles
from fitune.training.checkpoint import content as checkpoint_content
from fitune.units import MIB

EVENT = RunEvent(time=1.0, step=1, kind="resume", message="goes on")


class Disk:
    """While it is full, nothing can be opened for writing below runs/run, nor tensors be written."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, place: Path = RUN.path, fault: int = errno.ENOSPC
    ) -> None:
        self.is_full, self._place, self._fault = False, place.absolute(), fault
        plain, of_path = builtins.open, Path.open
        monkeypatch.setattr(
            builtins, "open", lambda *given, **options: self._opened(plain, *given, **options)
        )
        monkeypatch.setattr(
            Path, "open", lambda *given, **options: self._opened(of_path, *given, **options)
        )
        monkeypatch.setattr(checkpoint_content, "write_tensors", self._tensors)

    def _opened(
        self,
        really: Callable[..., Any],
        path: Any,
        mode: str = "r",
        *arguments: Any,
        **options: Any,
    ) -> Any:
        is_path = isinstance(path, (str, Path))
        if (
            self.is_full
            and is_path
            and mode.startswith(("w", "a", "x"))
            and self._place in Path(path).absolute().parents
        ):
            raise OSError(self._fault, os.strerror(self._fault))
        return really(path, mode, *arguments, **options)

    def _tensors(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
        if self.is_full:
            raise OSError(self._fault, os.strerror(self._fault))
        return write_tensors(path, tensors)


def at_steps(monkeypatch: pytest.MonkeyPatch, actions: Mapping[int, Callable[[], None]]) -> None:
    def act(self: TrainingProgress, metrics: StepMetrics, *, progress: float) -> None:
        actions.get(metrics.step, lambda: None)()

    monkeypatch.setattr(TrainingProgress, "step", act)


@pytest.mark.usefixtures("disturbed")
@pytest.mark.parametrize(("first", "last"), [(1, 2), (3, 6), (5, 8)])
def test_a_disk_that_is_full_for_some_steps_costs_nothing(
    first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    at_steps(
        monkeypatch,
        {
            first: lambda: setattr(disk, "is_full", True),
            last: lambda: setattr(disk, "is_full", False),
        },
    )
    train("sft.yaml")
    assert_same()
    told = [event.message for event in read_events(RUN.events) if event.kind == "files_wait"]
    assert (
        "cannot be written: No space left on device: what the run writes waits in memory" in told[0]
    )
    assert told[-1] == "what waited in memory is written"


@pytest.mark.usefixtures("disturbed")
def test_a_run_that_dies_while_lines_wait_goes_on_from_a_commit_that_has_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        disk = Disk(patched)
        at_steps(patched, {4: lambda: setattr(disk, "is_full", True), 8: die})
        with pytest.raises(Killed):
            main(["train", "sft.yaml"])
    train("--resume", "runs/run")
    assert_same()
    resumed = [event.message for event in read_events(RUN.events) if event.kind == "resume"]
    assert resumed[0] in ("goes on after step 2", "goes on after step 3")


@pytest.mark.usefixtures("disturbed")
def test_a_run_whose_end_finds_the_disk_full_waits_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for user in ("saving", "train"):
        monkeypatch.setattr(f"fitune.training.{user}.LAST_SAVE_SECONDS", 60.0)
    disk = Disk(monkeypatch)
    at_steps(monkeypatch, {STEPS: lambda: setattr(disk, "is_full", True)})
    monkeypatch.setattr(
        "fitune.training.saving.time.sleep", lambda _: setattr(disk, "is_full", False)
    )
    train("sft.yaml")
    assert_same()


@pytest.mark.usefixtures("disturbed")
def test_a_disk_that_stays_full_ends_the_run_in_a_sentence_and_it_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        at_steps(patched, {5: lambda: setattr(disk, "is_full", True)})
        said = error_of(capsys, "sft.yaml")
    assert said.startswith(
        f"error: step {STEPS} could not be saved: [Errno 28] No space left on device"
    )
    train("--resume", "runs/run")
    assert_same()


@pytest.mark.usefixtures("disturbed")
def test_what_waiting_does_not_mend_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        disk = Disk(patched, fault=errno.EACCES)
        at_steps(patched, {5: lambda: setattr(disk, "is_full", True)})
        said = error_of(capsys, "sft.yaml")
    assert "cannot be written: Permission denied" in said
    assert read_summary(RUN.summary).steps <= 5


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    files = PatientFiles()
    files.append(path, EVENT)
    whole = path.read_bytes()
    if os.name != "posix":
        pytest.skip("limits the size of a file")
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(patient_files, "_PASSING", frozenset({errno.ENOSPC, errno.EFBIG}))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
        files.append(path, EVENT)
        assert path.read_bytes() == whole
        assert files.size(path) == 2 * len(whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    files.flush()
    assert path.read_bytes() == whole * 2


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path)
    disk.is_full = True
    files = PatientFiles(most_bytes=500)
    for _ in range(500 // len(as_line(EVENT))):
        files.append(tmp_path / "metrics.jsonl", EVENT)
    with pytest.raises(
        RunDirectoryError, match=r"No space left on device, and 0\.0 MiB wait to be written"
    ):
        files.append(tmp_path / "metrics.jsonl", EVENT)


def test_samples_of_memory_give_up_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path)
    disk.is_full = True
    files = PatientFiles(most_bytes=500, drops_oldest=True)
    for step in range(50):
        files.append(tmp_path / "events.jsonl", RunEvent(time=1.0, step=step, kind="x", message=""))
    disk.is_full = False
    assert files.close(patience=0) is None
    steps = [event.step for event in read_events(tmp_path / "events.jsonl")]
    assert steps == list(range(50 - len(steps), 50))
    assert 1 < len(steps) < 12


def test_what_cannot_be_written_to_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path)
    disk.is_full = True
    files = PatientFiles(most_bytes=MIB)
    files.replace(tmp_path / "summary.json", {"steps": 1})
    lost = files.close(patience=0)
    assert lost is not None
    assert lost.endswith(
        "summary.json cannot be written: No space left on device: what waited to be written is lost"
    )
