"""The journal: what each step did, in a chain that shows the first line that was changed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fitune.errors import RunDirectoryError
from fitune.run.journal import (
    CHAIN_START,
    StepRecord,
    append_step,
    chained_hash,
    ids_hash,
    read_journal,
)

RECORD = StepRecord(
    step=1, position=3, ids_hash=ids_hash((7, 0, 7)), loss_weight=12.0, plan=((7,), (0, 7)),
    lr=1e-5, loss_sum=30.1, grad_norm=0.1 + 0.2, updated=True,
)  # fmt: skip


def write(path: Path, *records: StepRecord, **taken: Any) -> str:
    link = CHAIN_START
    for record in records:
        link = append_step(path, link, record, **({"seconds": 1.0} | taken))
    return link


def test_a_journal_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    empty = replace(
        RECORD, step=1, position=6, loss_weight=0.0, loss_sum=None, grad_norm=None, updated=False
    )
    diverged = replace(RECORD, step=2, loss_sum=math.inf, updated=False)
    link = write(path, RECORD, empty, diverged, attempts=2, peak_bytes=5)
    lines = read_journal(path)
    names = StepRecord.__dataclass_fields__
    assert [StepRecord(**{name: getattr(line, name) for name in names}) for line in lines] == [
        RECORD,
        empty,
        diverged,
    ]
    assert (lines[-1].hash, lines[-1].attempts, lines[-1].peak_bytes, lines[-1].free_bytes) == (
        link,
        2,
        5,
        None,
    )


@pytest.mark.parametrize(
    "change",
    [{"step": 2}, {"position": 4}, {"ids_hash": "0"}, {"loss_weight": 11.0}, {"plan": ((7, 0), (7,))},
     {"lr": 2e-5}, {"loss_sum": 30.2}, {"grad_norm": 0.3}, {"updated": False},
     {"reliefs": (("model.recompute=full",), ())}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_field_of_a_step_is_in_its_hash(change: dict[str, Any]) -> None:
    assert chained_hash(CHAIN_START, replace(RECORD, **change)) != chained_hash(CHAIN_START, RECORD)


def test_what_memory_and_clock_did_is_not_in_the_hash(tmp_path: Path) -> None:
    quick = write(tmp_path / "quick.jsonl", RECORD, seconds=0.1)
    assert write(tmp_path / "slow.jsonl", RECORD, seconds=9.0, attempts=3, peak_bytes=1) == quick


@pytest.mark.parametrize("lost", [0, 1])
def test_a_line_that_was_taken_out_is_noticed(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, RECORD, replace(RECORD, step=2), replace(RECORD, step=3))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:lost] + lines[lost + 1 :]))
    with pytest.raises(
        RunDirectoryError, match=rf"journal\.jsonl:{lost + 1}: step {lost + 2} does not follow"
    ):
        read_journal(path)


def test_a_line_that_was_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, RECORD)
    path.write_text(path.read_text().replace("1e-05", "1e-06"))
    with pytest.raises(RunDirectoryError, match=r"journal\.jsonl:1: step 1 does not follow"):
        read_journal(path)


@pytest.mark.parametrize("damage", ["", "no json", json.dumps({"step": 1})])
def test_a_line_that_is_none_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, RECORD)
    with path.open("a") as file:
        file.write(f"{damage}\n")
    with pytest.raises(RunDirectoryError, match=r"journal\.jsonl:2 is not a line of a journal"):
        read_journal(path)
