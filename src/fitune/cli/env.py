"""Implement `fitune env`, which describes the machine and the processes that use its cards."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any

import psutil
from cyclopts import Parameter

from fitune.cli.output import Format, Screen, console, print_json, print_text
from fitune.language import pad, say, translated
from fitune.machine.environment import environment, find_tcmalloc
from fitune.machine.nvml import CardProcess, CardState, read_cards
from fitune.units import GIB, format_bytes

_SIZES = {"total": "visible", "free": "free now", "used": "used by others"}
_MAX_PROCESSES = 5


def env(
    *,
    output: Annotated[Path, Parameter(help="where runs are kept, for the free disk space")] = Path(
        "runs"
    ),
    output_format: Format = "auto",
) -> None:
    """Print cards, their memory (nominal, visible, free, used by others), driver and versions."""
    machine = environment(output)
    states = chain(read_cards(), repeat(CardState()))
    machine["cards"] = [
        {**card, **_current_state(state)}
        for card, state in zip(machine["cards"], states, strict=False)
    ]
    if output_format == "json":
        print_json(machine)
    elif output_format == "quiet":
        print_text(
            max(
                (card["free_bytes"] or 0 for card in machine["cards"]),
                default=machine["host"]["free_bytes"],
            )
        )
    else:
        _print(machine, console(output_format))


def _print(machine: Mapping[str, object], screen: Screen) -> None:
    for title, lines in _sections(machine):
        for number, line in enumerate(lines):
            screen.print(
                pad(say(title) if number == 0 and title else "", 10) + translated(line),
                soft_wrap=True,
            )


def _sections(machine: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for index, card in enumerate(machine["cards"]):
        yield f"GPU {index}", _card_lines(card, machine["driver"])
    if not machine["cards"]:
        yield (
            "GPU",
            [
                "none that NVML or CUDA sees: runs use the processor; memory.gpu names a card to plan for"
            ],
        )
    cpu, host = machine["cpu"], machine["host"]
    cores = {"number": cpu["num_cores"] or "n/a", "usable": cpu["num_usable"] or "n/a"}
    yield "CPU", [f"{cpu['name'] or 'n/a'} · {say('{number} cores, {usable} usable', **cores)}"]
    limited = host["total_bytes"] < host["installed_bytes"]
    of = (
        translated(
            f" of {format_bytes(host['installed_bytes'])}, by the limit of its control group"
        )
        if limited
        else ""
    )
    yield (
        "RAM",
        [
            f"{format_bytes(host['total_bytes'])}{of} · {format_bytes(host['free_bytes'])} {say('free now')}"
        ],
    )
    yield "Disk", [f"{format_bytes(machine['disk']['free_bytes'])} free where runs are kept"]
    yield "malloc", _allocator_lines(machine)
    packages = [f"{name} {number}" for name, number in machine["packages"].items() if number]
    yield (
        "Versions",
        [f"fitune {machine['fitune']} · Python {machine['python']} · {machine['system']}"],
    )
    yield "", [" · ".join(packages[start : start + 4]) for start in range(0, len(packages), 4)]


def _card_lines(card: Mapping[str, Any], driver: str | None) -> list[str]:
    sizes = [say("{number} GB card", number=f"{card['box_bytes'] / GIB:.0f}")]
    sizes += [
        f"{format_bytes(card[f'{kind}_bytes'])} {say(words)}" for kind, words in _SIZES.items()
    ]
    facts = [
        f"{say('driver')} {driver or 'n/a'}",
        f"{say('compute capability')} {card['compute_capability'] or 'n/a'}",
    ]
    if card["utilisation_fraction"] is not None:
        facts.append(f"{card['utilisation_fraction']:.0%} {say('busy')}")
    if card["power_watts"] is not None:
        facts.append(f"{card['power_watts']:.0f} W")
    if card["temperature_celsius"] is not None:
        facts.append(f"{card['temperature_celsius']:.0f} °C")
    if card["throttled"]:
        facts.append(say("slowed down by {reason}", reason=card["throttled"]))
    return [
        f"{card['name']} · {' · '.join(sizes)}",
        " · ".join(facts),
        *_process_lines(card["processes"]),
    ]


def _process_lines(processes: list[Mapping[str, Any]]) -> list[str]:
    """Return a line about the processes that use the most memory of a card."""
    if not processes:
        return []
    shown = [
        f"{process['name'] or 'n/a'} ({process['pid']}) {format_bytes(process['used_bytes'])}"
        for process in processes[:_MAX_PROCESSES]
    ]
    more = len(processes) - len(shown)
    return [
        f"used by {' · '.join(shown)}{say(' · and {number} more', number=more) if more else ''}"
    ]


def _current_state(state: CardState) -> dict[str, Any]:
    processes = sorted(state.processes, key=lambda process: -(process.used_bytes or 0))
    return {
        "uuid": state.uuid,
        "utilisation_fraction": state.utilisation_fraction,
        "power_watts": state.power_watts,
        "temperature_celsius": state.temperature_celsius,
        "throttled": state.throttled,
        "processes": [{**asdict(process), "name": _process_name(process)} for process in processes],
    }


def _process_name(process: CardProcess) -> str | None:
    try:
        return psutil.Process(process.pid).name()
    except psutil.Error:  # the process has ended, or runs in another container
        return None


def _allocator_lines(machine: Mapping[str, Any]) -> list[str]:
    name = machine["allocator"]
    if machine["cards"] or name != "glibc":
        return [name or "n/a"]
    path = find_tcmalloc()
    way = (
        f"LD_PRELOAD={path}"
        if path
        else "install it (Debian: libtcmalloc-minimal4), then set LD_PRELOAD to it"
    )
    return [
        f"{name} · on the processor tcmalloc is as fast and was measured to need 8 to 57 % less memory:",
        way,
    ]
