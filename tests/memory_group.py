"""A memory control group of one's own, with a limit, for processes that share it: what a container has."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fitune.machine.devices import CGROUP_ROOT, PROCESS_CGROUPS


class NoControlGroupError(Exception):
    """This machine lets us make none; the sentence says why."""


@dataclass(frozen=True)
class MemoryGroup:
    path: Path
    limit_name: str
    used_name: str
    swap_limit_name: str

    def enter(self, pid: int = 0) -> None:
        """The process, 0 for this one, and what it starts from now on. What it holds already stays where it is."""
        (self.path / "cgroup.procs").write_text(str(pid or os.getpid()))

    def limit(self, limit_bytes: int) -> None:
        """Beyond it the kernel kills a process of the group; nothing is swapped out instead."""
        (self.path / self.limit_name).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # no swap is accounted for
            (self.path / self.swap_limit_name).write_text(
                str(limit_bytes if "memsw" in self.swap_limit_name else 0)
            )

    @property
    def used_bytes(self) -> int:
        """Without the page cache, which is given up before anything is killed."""
        statistics = dict(
            line.split() for line in (self.path / "memory.stat").read_text().splitlines()
        )
        cache = sum(int(statistics[name]) for name in ("active_file", "inactive_file"))
        return max(int((self.path / self.used_name).read_text()) - cache, 0)


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Empty and without a limit. Its processes must have ended when this does. Raises NoControlGroupError."""
    names: tuple[str, str, str]
    lines = (
        [line.split(":", 2) for line in PROCESS_CGROUPS.read_text().splitlines()]
        if PROCESS_CGROUPS.exists()
        else []
    )
    version_1 = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    if version_1:
        above = CGROUP_ROOT / "memory" / version_1[0].lstrip("/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.memsw.limit_in_bytes")
    else:
        above, names = CGROUP_ROOT, ("memory.max", "memory.current", "memory.swap.max")
    try:
        path = Path(tempfile.mkdtemp(prefix="fitune-", dir=above))
    except OSError as error:
        raise NoControlGroupError(
            f"a memory control group can be made by root alone: {error}"
        ) from error
    group = MemoryGroup(path, *names)
    try:
        if not (path / group.limit_name).exists():
            raise NoControlGroupError(f"{above} has no memory controller for its groups")
        yield group
    finally:
        path.rmdir()
