"""Memory that a second process takes: seen before each step, refused within it, and given back."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import second_process
from fitune.machine import devices
from fitune.machine.devices import cpu_device
from fitune.machine.process_memory import refusing, resident_free_in_heap
from fitune.recovery.observed import allocatable_bytes
from fitune.units import MIB
from memory_group import MemoryGroup, NoControlGroupError, memory_group

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux promises memory that is not there"
)
CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        with memory_group() as made:
            yield made
    except NoControlGroupError as reason:
        pytest.skip(str(reason))


def run_alone(code: str) -> None:
    """In a process of its own: what a long one has mapped and given back counts against what it may still take."""
    subprocess.run([sys.executable, "-c", TOUCH + code], check=True)


TOUCH = """
import time
import torch
from fitune.machine.process_memory import refusing
from fitune.machine.out_of_memory import memory_failure
from fitune.units import MIB

def touch(num_bytes):
    torch.ones(num_bytes, dtype=torch.uint8)

def is_refused(num_bytes):
    try:
        touch(num_bytes)
    except RuntimeError as error:
        return memory_failure(error) == "device"
    return False
"""


def test_what_is_not_there_is_refused_and_what_is_there_is_not() -> None:
    run_alone("""
with refusing(lambda: 256 * MIB):
    assert is_refused(512 * MIB)
    touch(128 * MIB)
touch(512 * MIB)
""")


def test_a_step_that_takes_all_leaves_something_to_what_comes_after_it() -> None:
    """A checkpoint's thread, say: what tensors leave free in the heap is of no use to it."""
    run_alone("""
import mmap, resource
from pathlib import Path

line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
limit = int(line.split()[1]) * 1024 + 100 * MIB
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
taken = []
with refusing(lambda: None):
    try:
        while True:
            taken.append(torch.ones(64 * 1024, dtype=torch.uint8))  # of the heap
    except RuntimeError as error:
        assert memory_failure(error) == "device"
assert len(taken) > 1000
mmap.mmap(-1, 12 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
""")


def test_what_another_takes_in_the_middle_of_a_step_is_refused_too() -> None:
    run_alone("""
left = [1024 * MIB]
with refusing(lambda: left[0]):
    touch(512 * MIB)
    left[0] = 256 * MIB
    time.sleep(5 * 0.1)
    assert is_refused(512 * MIB)
""")


def test_where_much_is_free_it_is_looked_at_once_a_second() -> None:
    """No process takes as much in that time; a look costs a millisecond."""
    looks: list[float] = []

    def free_bytes() -> int:
        looks.append(time.monotonic())
        return 256 * 1024 * MIB if len(looks) > 1 else 1024 * MIB

    with refusing(free_bytes):
        time.sleep(0.6)
    assert len(looks) <= 2 + (time.monotonic() - looks[0])  # at the beginning, and soon after that


def test_what_is_free_follows_the_files_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they change while a second process takes memory and gives it back."""
    monkeypatch.setattr(devices, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(devices, "PROCESS_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(f"{900 * MIB}\n")
    for used in (300, 800, 300):
        (tmp_path / "memory.current").write_text(f"{used * MIB}\n")
        room = allocatable_bytes(CPU)
        assert room is not None
        assert room == pytest.approx((900 - used) * MIB + resident_free_in_heap(), abs=MIB)


IN_A_GROUP = """
import torch
from fitune.machine.devices import cpu_device
from fitune.machine.process_memory import refusing
assert cpu_device().total_bytes == {limit}, cpu_device()
with refusing(lambda: cpu_device().free_bytes):
    try:
        torch.ones(2 * {limit}, dtype=torch.uint8)
    except RuntimeError as error:
        print("refused")
torch.ones(2 * {limit}, dtype=torch.uint8)
"""


def test_a_control_groups_kernel_kills_what_is_not_refused(group: MemoryGroup) -> None:
    group.limit(1024 * MIB)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP.format(limit=1024 * MIB)],
        preexec_fn=group.enter,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "refused\n", done.stderr
    assert done.returncode == -9


def test_the_page_cache_of_a_real_control_group_is_free(group: MemoryGroup, tmp_path: Path) -> None:
    """A file of 128 MiB that is written within it changes what is left by little."""
    before = "from fitune.machine.devices import cpu_device; first = cpu_device()"
    write = (
        f"open({str(tmp_path / 'file')!r}, 'wb').write(bytes(128 << 20)); import gc, os; os.sync()"
    )
    group.limit(512 * MIB)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{before}; {write}; print(first.free_bytes - cpu_device().free_bytes)",
        ],
        preexec_fn=group.enter,
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(int(done.stdout)) < 32 * MIB
    assert cpu_device().total_bytes > 512 * MIB  # this process is not in it


@pytest.mark.thorough
def test_a_second_process_makes_a_run_shrink_and_grow_back_with_the_same_losses(
    group: MemoryGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real memory of a real process, in one control group with the run; also a run that never had enough.

    How much memory a run keeps between its steps differs by machine and by run, so the limit is roomy, the second
    process takes all but half of what a step needs, and no number of micro-batches is expected.
    """
    monkeypatch.chdir(tmp_path)
    second_process.prepare(steps=36)
    alone = second_process.measure("alone")
    need_bytes = alone.peak_bytes - alone.held_bytes
    below = second_process.measure(
        "below", alone=alone, limit_bytes=alone.held_bytes + need_bytes // 2
    )
    crowded = second_process.measure(
        "crowded",
        alone=alone,
        limit_bytes=alone.peak_bytes + need_bytes,
        taken_bytes=need_bytes + need_bytes // 2,
        rate=100 * MIB,
        hold=2,
    )
    for outcome in (alone, below, crowded):
        second_process.show(outcome)
    for outcome in (below, crowded):
        assert outcome.kills == 0
        assert outcome.same_rows
        assert outcome.largest_loss_difference < 1e-5
    assert below.num_micro_batches[0] > 1
    before, since = (
        crowded.num_micro_batches[: second_process.TAKE],
        crowded.num_micro_batches[second_process.TAKE :],
    )
    assert max(since) > max(before)
    assert max(since) > since[-1]
    resized = [event for event in crowded.events if "micro-batches" in event]
    shrunk, grown = (
        [number for number, event in enumerate(resized) if f"micro-batches {word}" in event]
        for word in ("shrink", "grow")
    )
    assert shrunk[0] < grown[-1]
