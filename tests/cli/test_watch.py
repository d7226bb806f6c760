"""`fitune watch`: readable in every size, from the files alone, live and over."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from fitune.cli.app import main
from fitune.cli.watch_screen import watch_screen
from fitune.run.directory import RunDirectory, create_run
from fitune.run.files import write_json
from fitune.run.follow import RunView
from fitune.run.metrics import RunEvent, Summary, append_line, summary_json
from fitune.units import GIB
from watched_run import (
    SCREENS,
    START,
    sample,
    screens,
    step_metrics,
    view_of,
    write_lines,
    write_watched_run,
)

SOURCE = Path(__file__).parents[2] / "src"
NOW = START + 600.5
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SOURCE),
    "TERM": "xterm-256color",
    "FITUNE_LANG": "en",
}
for name in (
    "COLUMNS",
    "LINES",
):  # which a test runner may have set, and which go before the terminal's own size
    ENVIRONMENT.pop(name, None)


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    return write_watched_run(Path("runs"), status="finished")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return view_of(write_watched_run(tmp_path_factory.mktemp("runs")), "running")


def shown(view: RunView, *, width: int = 100, height: int | None = None) -> str:
    return watch_screen(view, width=width, height=height, now=NOW).plain


def test_the_screens_are_those_that_were_looked_at(tmp_path: Path) -> None:
    found = screens(tmp_path)
    assert found.keys() == {path.name for path in SCREENS.iterdir()}
    for name, content in found.items():
        assert content == (SCREENS / name).read_text(encoding="utf-8"), name


@given(width=st.integers(20, 250), height=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_a_screen_never_exceeds_its_terminal(running: RunView, width: int, height: int) -> None:
    lines = shown(running, width=width, height=height).split("\n")
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("height", [12, 16, 20, 23])
def test_the_last_event_is_shown_whole_where_there_is_room(running: RunView, height: int) -> None:
    text = " ".join(shown(running, width=80, height=height).split())
    assert text.endswith("look at its samples, or lower optim.lr") or "06:08:19" not in text


def test_a_diverged_loss_is_visible(running: RunView) -> None:
    steps = (*running.steps[:-1], replace(running.steps[-1], loss=float("nan")))
    assert "loss nan" in shown(replace(running, steps=steps))
    assert "!" in shown(replace(running, steps=steps))


def test_a_run_before_its_first_step_says_so(running: RunView) -> None:
    text = shown(replace(running, steps=(), evals=(), samples=(), events=()))
    assert "no step yet" in text
    assert "no sample yet" in text


def test_silence_is_told(running: RunView) -> None:
    text = watch_screen(running, width=80, height=20, now=START + 660.0).plain
    assert "no word for 1m00s" in text


def test_the_time_left_is_that_of_the_last_minutes(running: RunView) -> None:
    """1,600 steps of 1.5 s."""
    assert "left 40m00s" in shown(running)


def test_after_a_resume_the_time_left_is_that_of_the_new_steps(running: RunView) -> None:
    again = [
        replace(
            sample,
            time=sample.time + 1000,
            step=sample.step // 2,
            progress_fraction=sample.step // 2 / 2000,
        )
        for sample in running.samples
    ]
    assert "left 1h30m" in shown(replace(running, samples=(*running.samples, *again)))


def test_the_parts_of_the_card_sum_to_the_card(running: RunView) -> None:
    from fitune.cli.watch_screen import memory_classes

    sample = running.samples[-1]
    assert sum(part.now_bytes for part in memory_classes(running)) == sample.device_total_bytes


def test_on_a_cpu_the_parts_are_those_of_the_host(running: RunView) -> None:
    from fitune.cli.watch_screen import memory_classes

    host = replace(
        running.samples[-1], allocated_bytes=None, reserved_bytes=None, process_bytes=5 << 30, program_bytes=1 << 30,
        device_used_bytes=8 << 30, other_processes_bytes=3 << 30, peak_process_bytes=6 << 30,
    )  # fmt: skip
    view = replace(running, samples=(host,), steps=())
    parts = {part.name: part for part in memory_classes(view)}
    assert sum(part.now_bytes for part in parts.values()) == host.device_total_bytes
    assert list(parts) == ["program", "state", "activations", "others", "free"]
    assert parts["activations"].peak_bytes - parts["activations"].now_bytes == 1 << 30


def test_a_finished_run_is_shown_once(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", run.name]) == 0
    text = capsys.readouterr().out
    assert "finished" in text
    assert "eval 2.041 at step 400, best" in text


def test_the_latest_run_is_watched_where_none_is_named(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch"]) == 0
    assert run.name in capsys.readouterr().out


def test_a_run_that_is_nowhere_is_said(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "nothing"]) == 2
    assert (
        "there is no run nothing, neither as a directory nor as a name in runs"
        in capsys.readouterr().err
    )


def test_as_json_it_is_one_object_with_bytes(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "--once", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["schema"], content["state"], content["step"]["step"]) == (1, "finished", 400)
    assert content["memory"]["others"]["peak_bytes"] == 6 << 30


def test_quiet_is_the_state(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--format", "quiet"]) == 0
    assert capsys.readouterr().out == "finished\n"


def test_without_colour_and_unicode_the_bars_are_still_seen(run: RunDirectory) -> None:
    command = [sys.executable, "-m", "fitune", "watch", "--once"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"####" in done.stdout
    assert b"\x1b" not in done.stdout
    assert done.stdout.isascii()


def test_it_imports_nothing_heavy(run: RunDirectory) -> None:
    code = (
        "import sys; from fitune.cli.app import main; main(['watch', '--once']); "
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stderr == "set()\n"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: list[str], *, columns: int, rows: int) -> None:
        self._own, other = pty.openpty()
        self.resize(columns, rows)
        self.process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self.text = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, key: str) -> None:
        os.write(self._own, key.encode())

    def read_until(self, pattern: str, *, seconds: float = 60.0) -> str:
        """What was written until this pattern came up; fails where it does not."""
        self.text = ""
        due = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < due, self.text
            if select.select([self._own], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._own, 65536).decode(errors="ignore")
                except OSError:  # the program ended
                    assert re.search(pattern, self.text), self.text
        return self.text

    def close(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            os.close(self._own)


HOLD = (
    "import sys, time; from pathlib import Path; from fitune.run.directory import RunDirectory, working_on\n"
    "with working_on(RunDirectory(Path(sys.argv[1]))): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def held(run: RunDirectory) -> Iterator["subprocess.Popen[str]"]:
    """A process that works on the run."""
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


WATCH = [sys.executable, "-m", "fitune", "watch"]


def test_q_leaves_a_live_run_and_the_run_goes_on(held: "subprocess.Popen[str]") -> None:
    terminal = Terminal(WATCH, columns=80, rows=24)
    terminal.read_until("q leaves; the run goes on")
    terminal.press("q")
    assert terminal.close() == 0
    assert held.poll() is None


def test_a_new_size_of_the_terminal_is_followed(held: "subprocess.Popen[str]") -> None:
    terminal = Terminal(WATCH, columns=80, rows=24)
    terminal.read_until("23.6")
    terminal.resize(100, 30)
    assert "17.7" in terminal.read_until(
        "17.7"
    )  # the quarters of the scale, which 80 columns have no room for
    terminal.press("q")
    assert terminal.close() == 0


def test_a_run_that_died_is_at_one_step_for_watch_and_runs(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its summary is of the last save, its last sample of a step before the last line of the metrics."""
    write_json(
        run.summary, summary_json(Summary(steps=48, total_steps=480, peak_reserved_bytes=GIB))
    )
    write_lines(run.metrics, [step_metrics(step) for step in range(1, 75)])
    write_lines(run.memory, [sample(0.0, step=73, progress_fraction=73 / 481)])
    assert main(["watch", run.name, "--once"]) == 0
    assert "crashed" in (watched := capsys.readouterr().out)
    assert "step 74/480 (15.4%)" in watched
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:3] == ["crashed", "74"]


def test_where_only_tokens_end_a_run_its_steps_are_those_of_the_newest_sample(
    running: RunView,
) -> None:
    ahead = replace(running.steps[-1], step=407)
    assert "step 407/2,000" in shown(replace(running, steps=(*running.steps, ahead)))


def test_a_killed_run_is_shown_as_crashed(held: "subprocess.Popen[str]", run: RunDirectory) -> None:
    run.summary.write_text(run.summary.read_text().replace('"finished"', '"running"'))
    terminal = Terminal(WATCH, columns=80, rows=24)
    terminal.read_until("q leaves")
    os.kill(held.pid, signal.SIGKILL)
    terminal.read_until("crashed")
    assert terminal.close() == 0


def test_elsewhere_than_in_a_terminal_it_is_told_in_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path, "run")
    states = iter(["running", "running", "finished"])
    monkeypatch.setattr("fitune.run.directory._state", lambda *_: next(states, "finished"))
    monkeypatch.setattr("fitune.cli.watch.REFRESH_SECONDS", 0.0)
    append_line(run.metrics, step_metrics(1))
    append_line(run.events, RunEvent(time=START, step=1, kind="disk", message="warning: make room"))
    assert main(["watch", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1: warning: make room"
    assert "running" in lines[1]
    assert "finished" in lines[2]


def test_runs_shows_where_a_live_run_stands(
    held: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[1:8] == ["running", "20%", "400", "1.886", "2.041", "15.90", "38.4"]
    assert row[-2:] in (
        ["40m00s", "left"],
        ["39m54s", "left"],
    )  # the last step of the end of the file may lie behind
