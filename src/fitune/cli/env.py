"""`fitune env`: the machine."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pynvml
from cyclopts import Parameter
from rich.console import Console

from fitune.cli.output import Format, console, print_json
from fitune.run.environment import environment, find_tcmalloc
from fitune.units import format_bytes


def env(
    *,
    output: Annotated[Path, Parameter(help="where runs are kept, for the free disk space")] = Path("runs"),
    output_format: Format = "auto",
) -> None:
    """The machine: cards, memory (visible, free, used by others), driver, processor, versions."""
    machine = environment(_cards(), output)
    if output_format == "json":
        print_json(machine)
    elif output_format == "quiet":
        print(max((card["free_bytes"] or 0 for card in machine["cards"]), default=machine["host"]["free_bytes"]))
    else:
        _print(machine, console(output_format))


def _print(machine: Mapping[str, Any], screen: Console) -> None:
    for title, lines in _sections(machine):
        for number, line in enumerate(lines):
            screen.print(f"{title if number == 0 else '':<10}{line}", soft_wrap=True)


def _sections(machine: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for card in machine["cards"]:
        yield f"GPU {card['index']}", _card_lines(card)
    if not machine["cards"]:
        yield "GPU", ["none that NVML can see: runs use the processor; plan for a card with --gpu"]
    cpu, host = machine["cpu"], machine["host"]
    yield "CPU", [f"{cpu['name'] or 'n/a'} · {cpu['num_cores'] or 'n/a'} cores, {cpu['num_usable'] or 'n/a'} usable"]
    limited = "" if host["limit_bytes"] is None else " (limit of the control group)"
    yield "Memory", [f"{format_bytes(host['total_bytes'])}{limited} · {format_bytes(host['free_bytes'])} free"]
    yield "Disk", [f"{format_bytes(machine['disk']['free_bytes'])} free where runs are kept"]
    yield "malloc", _allocator_lines(machine)
    packages = [f"{name} {number}" for name, number in machine["packages"].items() if number]
    yield "Versions", [f"fitune {machine['fitune']} · Python {machine['python']} · {machine['system']}"]
    yield "", [" · ".join(packages[start : start + 4]) for start in range(0, len(packages), 4)]


def _card_lines(card: Mapping[str, Any]) -> list[str]:
    return [
        f"{card['name']} · {format_bytes(card['total_bytes'])} visible · {format_bytes(card['free_bytes'])} free now · "
        f"{format_bytes(card['used_bytes'])} used by others",
        f"driver {card['driver']} · compute {card['compute_capability'] or 'n/a'}",
    ]


def _allocator_lines(machine: Mapping[str, Any]) -> list[str]:
    name = machine["allocator"]
    if machine["cards"] or name != "glibc":
        return [name or "n/a"]
    path = find_tcmalloc()
    way = f"LD_PRELOAD={path}" if path else "install it (Debian: libtcmalloc-minimal4), then set LD_PRELOAD to it"
    return [f"{name} · on the processor tcmalloc is as fast and was measured to need 14 to 34 % less memory:", way]


def _cards() -> list[dict[str, Any]]:
    """What NVML, and so nvidia-smi, says of each card before this process uses it."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [_card(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _card(index: int, driver: str) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = _known(pynvml.nvmlDeviceGetMemoryInfo, handle)
    compute = _known(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return {
        "index": index,
        "name": pynvml.nvmlDeviceGetName(handle),
        "total_bytes": memory and memory.total,
        "free_bytes": memory and memory.free,
        "used_bytes": memory and memory.used,
        "compute_capability": compute and ".".join(map(str, compute)),
        "driver": driver,
    }


def _known(ask: Callable[[Any], Any], handle: Any) -> Any:
    """None where this card or its driver does not say, as with memory shared with the processor."""
    try:
        return ask(handle)
    except pynvml.NVMLError:
        return None
