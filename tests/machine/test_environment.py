"""What a run notes about its machine."""

import json
from pathlib import Path

import pytest

from fitune.machine.environment import c_allocator, environment


@pytest.mark.parametrize(
    ("maps", "name"),
    [
        ("7f0 r-xp /usr/lib/libtcmalloc_minimal.so.4\n7f1 /lib/libc.so.6", "tcmalloc"),
        ("7f0 /usr/lib/libjemalloc.so.2", "jemalloc"),
        ("7f0 /lib/ld-musl-x86_64.so.1", "musl"),
        ("7f0 /lib/libc.so.6", "glibc"),
    ],
)
def test_the_c_allocator_is_seen_in_the_memory_map(maps: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(maps)
    assert c_allocator(tmp_path / "maps") == name


def test_an_unknown_c_allocator_is_none(tmp_path: Path) -> None:
    assert c_allocator(tmp_path / "maps") is None


def test_the_record_is_json_and_names_no_directory(tmp_path: Path) -> None:
    text = json.dumps(environment(tmp_path / "not" / "yet"))
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert json.loads(text)["disk"]["free_bytes"] > 0
