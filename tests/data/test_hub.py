"""Whoever is offline is told at once, not after half a minute of attempts."""

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from fitune.config import ModelConfig
from fitune.data import hub
from fitune.errors import ModelError
from fitune.model.load import load_config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that are looked up; none is known."""
    names: list[str] = []

    def unknown(host: str, port: int | None) -> None:
        names.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.hub_is_known.cache_clear()
    yield names
    hub.hub_is_known.cache_clear()


def test_an_unknown_hub_is_asked_for_once_and_its_models_are_refused(asked: list[str]) -> None:
    for source in ("someone/model", "someone/other"):
        with pytest.raises(
            ModelError, match=f"{source} is not cached and the hub cannot be reached"
        ):
            load_config(ModelConfig(source=source))
    assert asked == ["mirror.example"]


def test_behind_a_proxy_names_are_the_proxys_matter(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    assert hub.hub_is_known()
    assert not asked
