"""A fixed number of damaged inputs for everything that fitune reads: each is read, or refused in a sentence.
`benchmarks/fuzz.py` tries twenty thousand, and others by other seeds."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzed import PARSERS, try_input

#: Inputs of all parsers together, in `make test` and in `make test-all`.
BUDGETS = (600, pytest.param(2500, marks=pytest.mark.thorough))
TOTAL = sum(parser.share for parser in PARSERS.values())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", PARSERS)
def test_what_is_damaged_is_read_or_refused_in_a_sentence(
    name: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    @settings(
        max_examples=max(int(budget * PARSERS[name].share / TOTAL), 3),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**32))
    def tried(seed: int) -> None:
        said = try_input(name, seed, tmp_path / "place")
        assert said is None or said.strip()

    tried()
