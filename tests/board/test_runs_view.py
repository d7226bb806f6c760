"""The Runs view: what it reads, what it sends, and what a browser shows of a run that goes on."""

import json
import os
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from browser import CHROMIUM, Browser, browser, served

from fitune.board.runs import HeldRun, RunsBoard, merge_patch
from fitune.errors import RunDirectoryError
from fitune.language import speaking
from fitune.report.embedded import read_report
from fitune.run.directory import RunDirectory, working_on
from fitune.run.files import write_json
from fitune.run.metrics import RunEvent, append_line
from watched_run import NUM_STEPS, START, sample, step_metrics, write_watched_run
from written_runs import Recipe, add_plan, three_configurations, write_run

LIVE = "minimind2-sft_2048-0007"
NASTY = "<img src=x onerror=\"document.title='run by data'\"> & 'a' مرحبا \x1b[2J"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs that are over, and one that goes on."""
    three_configurations(tmp_path)
    write_watched_run(tmp_path)
    return tmp_path


def apply(page: dict[str, object], patch: dict[str, object]) -> dict[str, object]:
    """What RFC 7386 says that a merge patch does."""
    found = dict(page)
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = apply(found[key], value)  # type: ignore[arg-type]
        else:
            found[key] = value
    return found


def test_what_changed_of_a_page_is_sent_and_gives_the_page(runs: Path) -> None:
    board, live = RunsBoard(runs), RunDirectory(runs / LIVE)
    with working_on(live):
        before = board.page([LIVE, "6x4"])
        assert merge_patch(before, board.page([LIVE, "6x4"])) == {}
        append_line(live.metrics, step_metrics(NUM_STEPS + 1))
        after = board.page([LIVE, "6x4"])
    patch = merge_patch(before, after)
    assert apply(before, patch) == after
    # nothing of the run that is over
    assert set(patch) == {"charts"}
    assert {key for chart in patch["charts"].values() for key in chart["series"]} <= {"0", "1"}  # type: ignore[attr-defined]
    drawn = [chart["series"] for chart in patch["charts"].values()]  # type: ignore[attr-defined]
    assert all(each.get("run", 0) == 0 for series in drawn for each in series.values())


def test_a_run_that_goes_on_is_read_from_where_it_was(runs: Path) -> None:
    live = RunDirectory(runs / LIVE)
    with working_on(live):
        held = HeldRun(live.path)
        first = held.read(10**6)
        assert held.read(10**6) is first
        # the beginning of the file is not read again
        text = live.metrics.read_bytes()
        live.metrics.write_bytes(b"x" * (text.index(b"\n")) + text[text.index(b"\n") :])
        append_line(live.metrics, step_metrics(NUM_STEPS + 1))
        second = held.read(10**6)
    assert (first.num_steps, second.num_steps) == (NUM_STEPS, NUM_STEPS + 1)
    assert (second.progress_fraction, second.state) == (pytest.approx(0.2), "running")


def test_long_runs_are_thinned_where_many_are_held(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitune.board.runs.MAX_ROWS", 160)
    board = RunsBoard(runs)
    page = board.page(["6x1", "6x4", "4x6"])
    assert "6x4" in page["verdict"][0]  # type: ignore[index]
    assert sum(held.num_rows for held in board._held.values()) <= 160 + 4
    # what is not looked at any more is forgotten
    board.page(["6x1"])
    assert sum(held.num_rows for held in board._held.values()) <= 160


def test_the_page_speaks_the_language_that_is_asked_for(runs: Path) -> None:
    board, names = RunsBoard(runs), ["6x1", "4x6"]
    with speaking("en"):
        english = board.page(names), board.listing()
    with speaking("zh"):
        chinese = board.page(names), board.listing()
    assert english[0]["verdict"][0].startswith("best: 4x6")  # type: ignore[index]
    assert chinese[0]["verdict"][0].startswith("最好：4x6")  # type: ignore[index]
    assert english[1] != chinese[1]


@pytest.mark.parametrize(
    "name", ["..", "../secret", "/etc", "", "6x1/..", "6x1/checkpoints", "link", "\0", "x" * 5000]
)
def test_a_name_that_leads_out_of_the_directory_is_no_run(name: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs, "6x1", Recipe(steps=2))
    write_run(tmp_path, "secret", Recipe(steps=2))
    (runs / "link").symlink_to(tmp_path / "secret")
    board = RunsBoard(runs)
    assert [run["id"] for run in board.listing()["runs"]] == ["6x1"]  # type: ignore[attr-defined]
    with pytest.raises(RunDirectoryError, match="is no run in"):
        board.page([name])


def damage(run: RunDirectory, kind: str) -> None:
    match kind:
        case "link":
            run.env.symlink_to("/etc/passwd")
        case "fifo":
            run.events.unlink()
            os.mkfifo(run.events)
        case "numbers":
            line = json.loads(run.metrics.read_text().splitlines()[0])
            huge = {"loss": "nan", "lr": 1e308, "grad_norm": "inf", "peak_reserved_bytes": 10**300}
            run.metrics.write_text(json.dumps(line | huge) + "\n[1]\n{\n" + "9" * 400 + "\n")
        case "plan":
            add_plan(run.path)
            run.plan.write_text(run.plan.read_text().replace("21474836480", '"x"'))
        case "bytes":
            for file in (run.config, run.summary, run.plan, run.memory, run.data):
                file.write_bytes(b"\xff\x00{")


@pytest.mark.parametrize("kind", ["link", "fifo", "numbers", "plan", "bytes"])
def test_a_damaged_run_is_shown_or_refused_in_a_sentence(kind: str, runs: Path) -> None:
    damage(RunDirectory(runs / "6x1"), kind)
    board = RunsBoard(runs)
    assert len(board.listing()["runs"]) == 4  # type: ignore[arg-type]
    with suppress(RunDirectoryError):
        json.dumps(board.page(["6x4", "6x1"]), allow_nan=False)


# With the server, and in a browser.


def ask(url: str, path: str) -> tuple[int, str]:
    """The status of the answer, and the answer or the first event of it."""
    address, _, token = url.partition("/#token=")
    try:
        with urlopen(Request(address + path, headers={"X-Fitune-Token": token})) as answer:
            if answer.headers["Content-Type"].startswith("text/event-stream"):
                return answer.status, answer.readline().decode() + answer.readline().decode()
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)
DRAWN = "[...document.querySelectorAll('.plot')].filter((plot) => plot.dataset.drawn).length"


def choose(tab: Browser, name: str, *, with_others: bool = False) -> None:
    """Click on a run of the list: its name, or the box that adds it to the others."""
    part = "input" if with_others else ".name"
    row = (
        "[...document.querySelectorAll('.runs li')].find((row) => "
        f"row.querySelector('.name').textContent === {json.dumps(name)})"
    )
    tab.wait(f"!!{row}")
    tab.run(f"{row}.querySelector('{part}').click()")


@needs_browser
def test_a_run_is_followed_two_are_compared_and_a_report_is_saved(
    runs: Path, tmp_path: Path
) -> None:
    live = RunDirectory(runs / LIVE)
    hostile = write_run(runs, "hostile", Recipe(steps=3, settings={"model": {"source": NASTY}}))
    append_line(RunDirectory(hostile).events, RunEvent(time=1e9, step=1, kind=NASTY, message=NASTY))
    write_json(RunDirectory(hostile).env, {"cards": [{"name": NASTY}]})
    with working_on(live), served(runs, ".") as url, browser() as tab:
        for path in ("/api/runs/follow?run=..", f"/api/runs/follow?run={quote('../x')}"):
            status, text = ask(url, path)
            assert (status, text.startswith("event: error\n")) == (200, True)
        assert ask(url, "/api/runs/report?run=..")[0] == 400
        tab.size(1280, 1000)
        tab.open(url.replace("/#", "/?#") if "?" in url else url)
        tab.wait("typeof fitune === 'object'")
        tab.run("location.hash = '#/runs'")
        # the run that goes on is chosen, and what it writes appears
        tab.wait(f"{DRAWN} > 3")
        shown = "document.querySelector('.page').textContent"
        assert LIVE in tab.run("document.querySelector('h1').textContent")
        last_x = "Math.max(...document.querySelector('[data-key=loss] .plot').data.at(-1).x)"
        assert tab.run(last_x) == NUM_STEPS
        for step in range(NUM_STEPS + 1, NUM_STEPS + 6):
            append_line(live.metrics, step_metrics(step))
        append_line(
            live.events,
            RunEvent(time=START + 700, step=405, kind="out_of_memory", message="no room"),
        )
        append_line(live.memory, sample(700.0), leave_out_unknown=True)
        tab.wait(f"{last_x} === {NUM_STEPS + 5} && {shown}.includes('no room')")
        # two runs are compared at equal tokens
        choose(tab, "6x1")
        tab.wait("document.querySelector('h1')?.textContent === '6x1'")
        choose(tab, "4x6", with_others=True)
        tab.wait("document.querySelector('.outcome')?.textContent.startsWith('best: 4x6')")
        tab.wait("document.querySelector('[data-key=intervals] .errorbar') !== null")
        assert tab.run("document.querySelector('input[name=axis]:checked').value") == "tokens"
        # nothing in the data becomes markup
        choose(tab, "hostile")
        tab.wait("document.querySelector('h1')?.textContent === 'hostile'")
        tab.wait(f"{shown}.includes('<img src=x')")
        assert tab.run("document.querySelectorAll('main img').length") == 0
        # the report is the same page
        tab.run(
            "document.title = ''; URL.createObjectURL = (blob) => { fitune.saved = blob.text(); return '#'; }"
        )
        tab.run("[...document.querySelectorAll('.actions button')].at(-1).click()")
        tab.wait("fitune.saved !== undefined")
        (tmp_path / "saved.html").write_text(tab.run("fitune.saved"), encoding="utf-8")
        assert tab.errors == []
        assert {
            request.split("/")[2] for request in tab.requests if request.startswith("http")
        } == {url.split("/")[2]}
    (saved,) = read_report(tmp_path / "saved.html")
    assert (saved.name, saved.num_steps) == ("hostile", 3)
