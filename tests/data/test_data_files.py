"""Files, directories and hub ids are read row by row, and what is wrong with them is said."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fitune.data.files
import fitune.data.json_window
from fitune.config import DataSource
from fitune.data.files import fingerprint, read_rows
from fitune.data.raw_rows import RawRow
from fitune.errors import DataError

ROWS = [{"text": "a"}, {"text": '中文 "quoted" ] }'}, {"text": "c\n", "more": [1, {"x": None}]}]


def read(path: Path | str, max_rows: int | None = None) -> list[RawRow]:
    return list(read_rows(DataSource(path=str(path), max_rows=max_rows)))


def values(path: Path | str) -> list[object]:
    return [row.value for row in read(path)]


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_lines_are_read_with_their_numbers_and_blank_ones_skipped(tmp_path: Path) -> None:
    (path := tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(row.line, row.value) for row in read(path)] == [(1, {"text": "a"}), (4, {"text": "b"})]


def test_an_array_is_read_with_the_lines_of_its_rows(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").write_text(
        json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    assert values(path) == ROWS
    assert [row.line for row in read(path)] == [2, 5, 8]


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    assert values(write_lines(tmp_path / "a.json", ROWS)) == ROWS


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


@settings(max_examples=50)
@given(rows=st.lists(JSON, min_size=1), chunk=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_an_array_is_the_same_whatever_part_of_it_is_held(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitune.data.json_window, "_CHUNK_CHARS", chunk)
        assert values(path) == rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text": "a"},\n {"text": b}]', "line 2: broken JSON, Expecting value"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: broken JSON, a comma is missing"),
        ('[{"text": "a"},\n', "line 2: broken JSON, Expecting value"),
        ('[{"text": "a"}\n', "line 2: broken JSON, the file ends inside its array"),
        ('[{"text": "a"}, {"te', "line 1: broken JSON, Unterminated string"),
        ('[{"text": "a"}]\n{}', "line 2: broken JSON, something follows"),
    ],
)
def test_a_broken_array_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    (path := tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        read(path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": "a"', "broken JSON at column 13: Expecting ',' delimiter"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        (b"[" * 100_000, "broken JSON: nested too deeply"),
    ],
)
def test_a_broken_line_is_yielded_with_its_fault_and_the_next_one_read(
    tmp_path: Path, line: bytes, fault: str
) -> None:
    (path := tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert [row.fault for row in read(path)] == [None, fault, None]


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path := tmp_path / "a.parquet")
    assert [(row.line, row.value["text"]) for row in read(path)] == [
        (1, "a"),
        (2, ROWS[1]["text"]),
        (3, "c\n"),
    ]


def test_csv_rows_are_objects_by_the_header(tmp_path: Path) -> None:
    (path := tmp_path / "a.csv").write_text('prompt,completion\nQ,"A, ""B""\nC"\n')
    assert values(path) == [{"prompt": "Q", "completion": 'A, "B"\nC'}]


def test_a_csv_row_that_is_too_wide_has_a_fault(tmp_path: Path) -> None:
    (path := tmp_path / "a.csv").write_text("text\na,b\n")
    assert read(path)[0].fault == "it has more cells than the header"


def test_a_directory_gives_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "sub" / "a.json", [{"text": "c"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    write_lines(tmp_path / ".cache" / "x.jsonl", [{"text": "hidden"}])
    (tmp_path / "README.md").write_text("no data")
    assert [value["text"] for value in values(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty: it holds no sample"),
        ("a.jsonl", b"\n \n", "is empty: it holds no sample"),
        ("a.json", b"[]", "is empty: it holds no sample"),
        ("a.csv", b"text\n", "is empty: it holds no sample"),
        ("a.jsonl", b"\x1f\x8b\x08\x00\x00", "is no text file"),
        ("a.parquet", b"no parquet at all", "cannot be read as parquet"),
        ("a.csv", b'text\n"a', "line 1: broken CSV"),
        ("a.txt", b"text", "unknown ending '.txt'"),
    ],
)
def test_a_file_without_readable_rows_is_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        read(tmp_path / "none.jsonl")


def test_a_directory_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="holds no data"):
        read(tmp_path)


def test_a_name_that_is_neither_a_path_nor_reachable_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"no data at someone/something: .* cannot be loaded from the hub"
    ):
        read("someone/something")


def test_a_hub_dataset_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    loaded = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, split: {("me/it", "train"): loaded}[path, split]
    )
    assert read("me/it") == [RawRow("me/it", 1, {"text": "a"}), RawRow("me/it", 2, {"text": "b"})]


def test_a_sample_is_the_same_each_time_and_keeps_the_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)])
    lines = [row.line for row in read(f"{path}#10")]
    assert len(lines) == 10
    assert lines == sorted(lines) == [row.line for row in read(f"{path}#10")]
    assert lines != list(range(1, 11))
    assert len(read(f"{path}#1000")) == 100


def test_a_file_whose_name_ends_like_a_sample_is_itself(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.jsonl#2")
    with pytest.raises(DataError, match="unknown ending"):
        read(path)


def test_a_sample_of_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 samples"):
        read(f"{write_lines(tmp_path / 'a.jsonl', ROWS)}#0")


def test_reading_stops_at_max_rows(tmp_path: Path) -> None:
    assert len(read(write_lines(tmp_path / "a.jsonl", ROWS), max_rows=2)) == 2


def test_the_fingerprint_of_a_small_file_follows_its_content_not_its_time(tmp_path: Path) -> None:
    source = DataSource(path=str(path := write_lines(tmp_path / "a.jsonl", ROWS)))
    first = fingerprint(source)
    path.touch()
    assert fingerprint(source) == first
    path.write_text(path.read_text().replace('"a"', '"b"'))
    assert fingerprint(source) != first


def test_the_fingerprint_of_a_large_file_follows_its_time_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setattr(fitune.data.files, "_SMALL_FILE_BYTES", 10)
    source = DataSource(path=str(path := tmp_path / "a.jsonl"))
    path.write_bytes(b"x" * 200_000)
    os.utime(path, (1, 1))
    first = fingerprint(source)
    os.utime(path, (2, 2))
    assert fingerprint(source) != first
    path.write_bytes(b"x" * 199_999 + b"y")
    os.utime(path, (1, 1))
    assert fingerprint(source) != first
