"""What NVIDIA's library tells, through nvidia-ml-py itself, from a stand-in that answers as real cards do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.app import main
from fitune.machine.nvml import CardMemory, CardProcess, CardState, card_reader, read_cards
from fitune.units import MIB

SOURCE = Path(__file__).parents[2] / "src"
pytestmark = pytest.mark.usefixtures("stand_in")


def cards() -> tuple[CardState, CardState]:
    first, second = read_cards()
    return first, second


def env(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["env", *arguments]) == 0
    return capsys.readouterr().out


def test_a_card_tells_its_memory_without_what_the_driver_keeps() -> None:
    assert cards()[0].memory == CardMemory(
        (24564 - 400) * MIB, (24564 - 400 - 1324) * MIB, 1324 * MIB
    )


def test_a_card_tells_load_power_heat_and_what_slows_it_down() -> None:
    card = cards()[0]
    assert (card.utilisation_fraction, card.power_watts, card.temperature_celsius) == (
        0.97,
        382.0,
        71.0,
    )
    assert card.throttled == "power limit, heat"


def test_an_idle_card_is_slowed_down_by_nothing(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setenv("STAND_IN_NVML", "idle")
    assert cards()[0].throttled == ""


def test_processes_that_compute_and_that_draw_are_listed() -> None:
    assert cards()[0].processes == (
        CardProcess(4200001, 1024 * MIB),
        CardProcess(4200002, 300 * MIB),
    )


def test_a_divided_card_stands_for_its_first_part() -> None:
    card = cards()[1]
    assert card.uuid == "MIG-33333333-cccc"
    assert card.memory is not None
    assert card.memory.total_bytes == (4864 - 400) * MIB


def test_a_part_has_no_load_but_the_power_and_heat_of_its_card() -> None:
    card = cards()[1]
    assert (card.utilisation_fraction, card.power_watts, card.temperature_celsius) == (
        None,
        210.0,
        55.0,
    )


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1,0", ["MIG-33333333-cccc", "GPU-11111111-aaaa"]),
        ("GPU-1111", ["GPU-11111111-aaaa"]),
        ("MIG-33333333-cccc", ["MIG-33333333-cccc"]),
        ("MIG-unknown,0", []),
        ("-1", []),
    ],
)
def test_the_visible_cards_count_in_their_order(
    visible: str, uuids: list[str], stand_in: pytest.MonkeyPatch
) -> None:
    stand_in.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.uuid for card in read_cards()] == uuids


def test_wsl_knows_no_memory_by_process(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setenv("STAND_IN_NVML", "wsl")
    assert [process.used_bytes for process in cards()[0].processes] == [None, None]


def test_a_size_that_no_card_has_is_unknown(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setenv("STAND_IN_NVML", "no_memory")
    assert cards()[0].memory is None


def test_a_card_that_is_lost_answers_nothing_and_raises_nothing(
    stand_in: pytest.MonkeyPatch,
) -> None:
    stand_in.setenv("STAND_IN_NVML", "lost")
    assert cards()[0] == CardState()


def test_without_a_driver_there_are_no_cards(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setenv("STAND_IN_NVML", "no_driver")
    assert read_cards() == ()


@pytest.mark.parametrize("uuid", ["11111111-aaaa", "unknown"])
def test_one_card_is_read_by_its_uuid_or_else_its_number(uuid: str) -> None:
    with card_reader(uuid, 0) as read:
        assert read is not None
        assert read().uuid == "GPU-11111111-aaaa"


def test_a_card_that_is_lost_while_it_is_read_is_unknown(stand_in: pytest.MonkeyPatch) -> None:
    with card_reader("11111111-aaaa", 0) as read:
        assert read is not None
        stand_in.setenv("STAND_IN_NVML", "lost")
        assert read().memory is None


def test_env_shows_three_sizes_the_state_and_who_uses_the_card(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = env(capsys).splitlines()
    assert lines[0].split(maxsplit=2)[2] == (
        "NVIDIA GeForce RTX 4090 · 24 GB card · 23.6 GiB visible · 22.3 GiB free now · 1.3 GiB used by others"
    )
    assert lines[1].strip() == (
        "driver 595.71 · compute capability 8.9 · 97% busy · 382 W · 71 °C · slowed down by power limit, heat"
    )
    assert lines[2].strip() == "used by n/a (4200001) 1.0 GiB · n/a (4200002) 300.0 MiB"


def test_env_names_a_process_that_it_can_see(
    stand_in: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.setenv("STAND_IN_PID", str(os.getpid()))
    stand_in.setenv("STAND_IN_OWN_MIB", "5000")
    first = json.loads(env(capsys, "--format", "json"))["cards"][0]["processes"][0]
    assert first["pid"] == os.getpid()
    assert first["name"]
    assert first["used_bytes"] == 5000 * MIB


@pytest.mark.parametrize("mode", ["wsl", "lost", "no_memory"])
def test_env_works_where_little_is_known(
    mode: str, stand_in: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.setenv("STAND_IN_NVML", mode)
    assert "driver 595.71" in env(capsys)


def test_nvidia_ml_py_loads_the_library_by_its_name(stand_in_library: Path) -> None:
    environment: dict[str, Any] = {
        **os.environ, "LD_LIBRARY_PATH": str(stand_in_library.parent), "PYTHONPATH": str(SOURCE),
    }  # fmt: skip
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "fitune", "env", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [card["uuid"] for card in json.loads(done.stdout)["cards"]] == [
        "GPU-11111111-aaaa",
        "MIG-33333333-cccc",
    ]
