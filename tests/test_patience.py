"""A recording that takes too long ends in a sentence that says what took it, and says meanwhile that it goes on."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fitune
from fitune.errors import FituneError, UsageError
from fitune.trace import patience


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
    with pytest.raises(FituneError, match=r"more than 0 s .* in position_by_position of test_patience\.py"):
        predict(100_000)


def test_a_recording_within_its_limit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "60")
    predict(50)


def test_a_long_recording_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "TOLD_EVERY_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING, "fitune"):
        predict(500)
    assert "still recording the step" in caplog.text


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_limit_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, text)
    with pytest.raises(UsageError, match=patience.VARIABLE):
        predict(5)
