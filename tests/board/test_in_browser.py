"""The Plan view in a real browser: a plan explored, a run started, stopped and resumed."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser, served

from fitune.board.processes import Launcher
from fitune.run.directory import RunDirectory, read_run
from tiny_run import WIDE_VOCABULARY, save_tiny_model, write_dialogues

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"
)
PLANNED = (
    "document.querySelector('.stage')?.textContent === '' && !!document.querySelector('.verdict')"
)


def open_board(tab: Browser, url: str, settings: dict[str, str]) -> None:
    """Opens the page with settings that it has kept, as when one comes back to it."""
    tab.size(1280, 900)
    kept = json.dumps(json.dumps(settings))
    script = f"localStorage.setItem('fitune-plan', {kept})"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    tab.open(url)
    tab.wait(PLANNED)


def check_alone(tab: Browser, url: str) -> None:
    """No error on the console, and nothing asked of another place."""
    own = url.partition("#")[0]
    assert tab.errors == []
    assert [each for each in tab.requests if not each.startswith((own, "data:", "blob:"))] == []


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_plan_is_explored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "tiny", WIDE_VOCABULARY)
    settings = {
        "model.source": "tiny", "memory.gpu": "RTX 3060", "batch.effective": "8", "data.max_length": "256",
        "model.recompute": "off", "loss": "full",
    }  # fmt: skip
    with served(tmp_path) as url, browser() as tab:
        open_board(tab, url, settings)
        assert tab.run("location.href") == url.partition("#")[0]  # without the token
        assert tab.run("document.querySelector('h1').textContent").startswith(
            "Fits RTX 3060 12GB: "
        )
        before = tab.run("document.querySelector('.bar').getAttribute('aria-label')")
        tab.run("document.getElementById('field-Micro-batch--samples-at-once').focus()")
        tab.call(
            "Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", windowsVirtualKeyCode=39
        )
        tab.wait("!!document.querySelector('.answer').dataset.milliseconds")
        assert tab.run("document.querySelector('.bar').getAttribute('aria-label')") != before
        tab.wait("document.querySelector('.commands').textContent.includes('--micro 1')")
        tab.wait(PLANNED)
        tab.run("document.getElementById('language').click()")
        tab.wait("document.querySelector('h1')?.textContent.startsWith('RTX 3060 12GB 放得下')")
        check_alone(tab, url)


@pytest.mark.thorough
def test_a_run_is_started_stopped_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "tiny")
    write_dialogues(tmp_path / "sft.jsonl")
    settings = {
        "model.source": "tiny", "memory.gpu": "cpu", "batch.effective": "4", "data.max_length": "64",
        "data.train": "sft.jsonl", "train.steps": "3000", "run.name": "first", "train.eval_every": "3000",
        "model.recompute": "off", "loss": "chunked", "batch.micro": "4",
    }  # fmt: skip
    run = tmp_path / "runs" / "first"
    with served(tmp_path) as url, browser() as tab:
        open_board(tab, url, settings)
        tab.run("document.querySelector('.start button').click()")
        tab.wait("!!document.querySelector('.start a')", 120)
        assert tab.run("document.querySelector('.start a').hash") == "#/runs/first"
        wait_for(lambda: (run / "metrics.jsonl").exists())
        assert (
            tab.run("fitune.post('/api/stop', {run: 'first'}).then((told) => told.run)") == "first"
        )
        wait_for(lambda: read_run(run).state == "stopped")
        summary = read_run(run).summary
        assert summary is not None
        assert 0 < summary.steps < 3000
        assert any((run / "checkpoints").iterdir())
        tab.run("fitune.post('/api/resume', {run: 'first'})")
        wait_for(lambda: read_run(run).state == "running")
        again = "fitune.post('/api/resume', {run: 'first'}).catch((error) => error.message)"
        assert tab.run(again).endswith("first is running already")
        # an error of the run is the sentence of the command line
        tab.run("document.querySelector('.start button').click()")
        told = tab.wait("document.querySelector('.start .bad')?.textContent", 120)
        assert "exists" in told
        tab.errors.clear()  # the browser says that two answers were refusals
        check_alone(tab, url)
    # the run outlives the board
    assert read_run(run).state == "running"
    Launcher(tmp_path).stop(RunDirectory(run))
    wait_for(lambda: read_run(run).state == "stopped")
