"""A recording that takes too long ends in a sentence that says what took it, and says meanwhile that it goes on."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fitune
from fitune.errors import FituneError, TooLongError, UsageError
from fitune.planning import second_process
from fitune.recorder import patience
from tiny_run import save_tiny_model


class Recurrent(nn.Module):
    """Goes through the positions of a row one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.position_by_position(x_TD)

    def position_by_position(self, x_TD: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x_TD[0])
        for x_D in x_TD:
            state = torch.tanh(self.cell(x_D) + state)
        return state


def predict(positions: int) -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        x = torch.zeros(positions, 8, device=device)
        return lambda: model(x).sum().backward()

    fitune.predict_loop(Recurrent, loop, gpu="RTX 4090")


def test_a_recording_has_a_limit_and_names_what_took_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "0.2")
    with pytest.raises(
        FituneError, match=r"more than 0 s .* in position_by_position of test_patience\.py"
    ):
        predict(100_000)


def test_the_limit_names_what_took_long_in_an_earlier_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = patience.Patience()
    monkeypatch.setattr(patience, "_place", lambda frame: "scan of model.py")
    with shared.recording():
        for _ in range(2048):
            shared.operator()
    monkeypatch.setenv(patience.VARIABLE, "1e-9")
    with (
        pytest.raises(TooLongError, match=r"2,048 operators, most of them in scan of model\.py"),
        shared.recording(),
    ):
        pass


def test_a_recording_within_its_limit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "60")
    predict(50)


def test_a_long_recording_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "REPORT_EVERY_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING, "fitune"):
        predict(150)
    assert "still recording the step" in caplog.text


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_limit_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, text)
    with pytest.raises(UsageError, match=patience.VARIABLE):
        predict(5)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration whose recordings take two seconds each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(second_process, "_can_fork", lambda: False)
    seconds = itertools.count()
    monkeypatch.setattr(patience, "time", SimpleNamespace(thread_time=lambda: float(next(seconds))))
    save_tiny_model(tmp_path / "tiny")
    return {
        "model": {"source": str(tmp_path / "tiny"), "init": "random"},
        "data": {"train": "rows.jsonl", "max_length": 32},
        "batch": {"effective": 4},
    }


@pytest.mark.thorough
def test_recordings_of_a_plan_have_a_limit_together_and_what_was_found_is_told(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "15")
    plan = fitune.plan(tree, gpu="RTX 4090")
    assert plan.chosen is not None
    assert [
        line
        for line in plan.assumptions
        if line.startswith("not every setting was looked at: recording the step")
    ]
    monkeypatch.setenv(patience.VARIABLE, "1000")
    assert len(fitune.plan(tree, gpu="RTX 4090").candidates) > len(plan.candidates)


def test_a_plan_that_found_nothing_in_its_time_says_so_and_not_that_nothing_fits(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "0.5")
    with pytest.raises(TooLongError, match="more than 0 s of processor time"):
        fitune.plan(tree, gpu="RTX 4090")


def test_the_recordings_of_a_prediction_have_a_limit_together(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.VARIABLE, "0.5")
    with pytest.raises(TooLongError, match="wait longer with FITUNE_RECORD_SECONDS"):
        fitune.predict(tree, gpu="RTX 4090")
