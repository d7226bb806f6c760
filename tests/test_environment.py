"""What a run notes about its machine."""

import json
from pathlib import Path

import psutil
import pytest

from fitune.run.environment import c_allocator, environment, host_memory
from fitune.units import GIB


def group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_the_limit_of_a_control_group_is_respected(tmp_path: Path) -> None:
    inside = "sys/fs/cgroup/a/b"
    root = group(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            f"{inside}/memory.max": "max\n", f"{inside}/memory.current": "0", f"{inside}/memory.stat": "",
            "sys/fs/cgroup/a/memory.max": str(8 * GIB), "sys/fs/cgroup/a/memory.current": str(3 * GIB),
            "sys/fs/cgroup/a/memory.stat": f"file 9\ninactive_file {GIB}\n",
        },
    )  # fmt: skip
    assert host_memory(root) == {"total_bytes": 8 * GIB, "free_bytes": 6 * GIB, "limit_bytes": 8 * GIB}


def test_the_limit_of_an_old_control_group_is_respected(tmp_path: Path) -> None:
    mount = "sys/fs/cgroup/memory"
    root = group(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/seen/from/the/host\n0::/\n",
            f"{mount}/memory.limit_in_bytes": str(8 * GIB), f"{mount}/memory.usage_in_bytes": str(3 * GIB),
            f"{mount}/memory.stat": "",
        },
    )  # fmt: skip
    assert host_memory(root) == {"total_bytes": 8 * GIB, "free_bytes": 5 * GIB, "limit_bytes": 8 * GIB}


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == {"total_bytes": 64 * GIB, "free_bytes": 60 * GIB, "limit_bytes": None}


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
    text = json.dumps(environment([], tmp_path / "not" / "yet"))
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert json.loads(text)["disk"]["free_bytes"] > 0
