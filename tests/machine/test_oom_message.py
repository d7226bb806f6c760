"""What PyTorch says when memory runs out is read, in the words of each version, and answered with what helps."""

import io

import pytest

from fitune.cli.app import main
from fitune.errors import UsageError
from fitune.machine.oom_message import OomMessage, read_oom_message
from fitune.units import GIB, MIB

# Worded as c10/cuda/CUDACachingAllocator.cpp does, with numbers of our own.
NEW = """
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.50 GiB
of which 1.00 GiB is free. Process 77 has 2.00 GiB memory in use. Including non-PyTorch memory, this process has
20.50 GiB memory in use. Of the allocated memory 18.00 GiB is allocated by PyTorch, and 2.25 GiB is reserved by
PyTorch but unallocated. If reserved but unallocated memory is large try setting ...
"""
OLD = (
    "RuntimeError: CUDA out of memory. Tried to allocate 512.00 MiB (GPU 0; 11.00 GiB total capacity; 9.00 GiB "
    "already allocated; 256.00 MiB free; 9.25 GiB reserved in total by PyTorch)"
)


def test_the_numbers_of_a_message_are_read_in_the_words_of_each_version() -> None:
    new = read_oom_message(NEW)
    assert new == OomMessage(
        asked_bytes=3 * GIB // 2,
        total_bytes=47 * GIB // 2,
        free_bytes=GIB,
        process_bytes=41 * GIB // 2,
        allocated_bytes=18 * GIB,
        unused_bytes=9 * GIB // 4,
        others_bytes=2 * GIB,
    )
    assert (new.outside_bytes, new.missing_bytes, new.is_fragmented) == (GIB // 4, GIB // 2, True)
    old = read_oom_message(OLD)
    assert (old.asked_bytes, old.free_bytes) == (512 * MIB, 256 * MIB)
    assert (old.unused_bytes, old.is_fragmented, old.outside_bytes) == (256 * MIB, False, None)


def test_text_without_a_message_is_refused() -> None:
    with pytest.raises(UsageError, match="give the whole message of"):
        read_oom_message("Killed")


@pytest.mark.parametrize(
    ("text", "said", "not_said"),
    [
        (
            NEW,
            ["expandable_segments:True", "other processes hold 2.0 GiB", "512.0 MiB are missing"],
            [],
        ),
        (
            OLD,
            ["256.0 MiB are missing", "halve the micro-batch"],
            ["expandable", "other processes"],
        ),
    ],
    ids=["new", "old"],
)
def test_the_command_says_what_helps(
    text: str,
    said: list[str],
    not_said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["explain"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(each in shown for each in said), shown
    assert not any(each in shown for each in not_said)
