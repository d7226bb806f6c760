"""The cache of tokenised rows, with several processes and with one that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fitune.data.table import TableRow, TableWriter, cached_table

SOURCE = Path(__file__).parents[2] / "src"
ROWS = [
    TableRow([1, 2, 3, 4, 5], ((1, 2, 1.0), (3, 5, 0.5)), 9, 2**64 - 1, 0),
    TableRow([], (), 7, 1, 1),
    TableRow([6, 7], ((1, 2, 1.0),), 2, 2, 1),
]
PROGRAM = """
import pathlib, sys, time
from fitune.data.table import TableRow, cached_table
def write(writer):
    log = pathlib.Path(sys.argv[1])
    writer.append([TableRow([1, 2], ((1, 2, 1.0),), 2, 3, 0)])
    log.open("a").write("began\\n")
    time.sleep(float(sys.argv[2]))
    return {}
print(cached_table("key", write).digest)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    return tmp_path / "data"


def start(log: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(log), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def write(writer: TableWriter) -> dict[str, object]:
    writer.append(ROWS[:2])
    writer.append(ROWS[2:])
    return {"fact": 1}


@pytest.mark.parametrize("name", ["rows.arrow", "facts.json"])
def test_a_table_with_one_flipped_bit_is_made_again(name: str, cache: Path) -> None:
    cached_table("key", write)
    (file,) = cache.glob(f"*/{name}")
    content = file.read_bytes()
    for place in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        table = cached_table("key", write)
        assert [table.row(i)[0].tolist() for i in range(3)] == [[1, 2, 3, 4, 5], [], [6, 7]]
        assert table.facts == {"fact": 1}
        assert file.read_bytes() == content


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"digest": 1}', "{"])
def test_a_table_whose_facts_are_none_is_made_again(text: str, cache: Path) -> None:
    cached_table("key", write)
    (file,) = cache.glob("*/facts.json")
    file.write_text(text)
    assert cached_table("key", write).facts == {"fact": 1}


def test_a_table_gives_back_its_rows() -> None:
    table = cached_table("key", write)
    assert [table.row(i)[0].tolist() for i in range(3)] == [[1, 2, 3, 4, 5], [], [6, 7]]
    assert [table.row(i)[1].tolist() for i in range(3)] == [[0, 1, 0, 0.5, 0.5], [], [0, 1]]
    assert (table.lengths.tolist(), table.full_lengths.tolist()) == ([5, 0, 2], [9, 7, 2])
    assert (table.num_supervised.tolist(), table.sources.tolist()) == ([3, 0, 1], [0, 1, 1])
    assert (table.digests.tolist(), table.facts) == ([2**64 - 1, 1, 2], {"fact": 1})


def test_the_digest_follows_the_rows_and_their_weights() -> None:
    def write_other(writer: TableWriter) -> dict[str, object]:
        writer.append(
            [TableRow([1, 2, 3, 4, 5], ((1, 2, 1.0), (3, 5, 1.0)), 9, 2**64 - 1, 0), ROWS[1]]
        )
        writer.append(ROWS[2:])
        return {}

    assert cached_table("key", write).digest != cached_table("other key", write_other).digest


def test_a_row_is_a_copy_that_may_be_changed() -> None:
    table = cached_table("key", write)
    table.row(0)[0][:] = 0
    assert np.array_equal(table.row(0)[0], [1, 2, 3, 4, 5])


def test_of_two_processes_one_writes_and_the_other_waits(tmp_path: Path) -> None:
    processes = [start(tmp_path / "log", 0.5) for _ in range(2)]
    digests = [process.communicate()[0] for process in processes]
    assert digests[0] == digests[1] != ""
    assert (tmp_path / "log").read_text() == "began\n"


def test_a_process_killed_in_the_middle_leaves_nothing_that_is_read(
    tmp_path: Path, cache: Path
) -> None:
    process = start(tmp_path / "log", 60)
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*.unfinished"))
    assert cached_table("key", write).lengths.tolist() == [5, 0, 2]
    assert not list(cache.glob("*.unfinished"))
