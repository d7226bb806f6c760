"""Parameters of which `make test` takes a part, for example as many combinations as cover every pair of values."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import combinations as pairs_of
from itertools import product
from typing import Any

import pytest


def combinations(
    values: Mapping[str, Iterable[Any]], *, possible: Callable[..., bool] = lambda *_: True
) -> Callable[[Any], Any]:
    """Return a decorator that gives a test one argument of each name, in all possible combinations.

    possible(*values): whether a combination makes sense. Combinations beyond those that cover every pair of values are
    marked `thorough`, which `make test-all` runs.
    """
    columns = [list(column) for column in values.values()]
    numbers = [range(len(column)) for column in columns]
    all_rows = [row for row in product(*numbers) if possible(*_picked(columns, row))]
    covering = _covering_pairs(all_rows)
    rows = [
        pytest.param(
            *_picked(columns, row),
            id="-".join(_name(value) for value in _picked(columns, row)),
            marks=() if row in covering else (pytest.mark.thorough,),
        )
        for row in all_rows
    ]
    return pytest.mark.parametrize(list(values), rows)


def some_of(rows: Iterable[tuple[Any, ...]], quick: Container[tuple[Any, ...]]) -> list[Any]:
    """Return all rows as parameters of a test, those beyond `quick` marked `thorough`."""
    return [
        pytest.param(*row, marks=() if row in quick else (pytest.mark.thorough,)) for row in rows
    ]


def _covering_pairs(rows: Sequence[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Choose rows until every pair of values stands in one, each time the row with most missing pairs."""
    pairs = {row: set(pairs_of(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def _picked(columns: Sequence[Sequence[Any]], row: Sequence[int]) -> list[Any]:
    return [column[number] for column, number in zip(columns, row, strict=True)]


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
