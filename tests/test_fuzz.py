"""A fixed number of damaged inputs for everything that fitune reads: each is read, or refused in a sentence.
`benchmarks/fuzz.py` tries twenty thousand, and others by other seeds."""

from pathlib import Path

import pytest

from fuzzed import PARSERS, try_input

BUDGET = 2500


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_damaged_is_read_or_refused_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    total = sum(parser.share for parser in PARSERS.values())
    for seed in range(max(int(BUDGET * PARSERS[name].share / total), 3)):
        said = try_input(name, seed, tmp_path / "place")
        assert said is None or said.strip()
