"""Finds CUDA cards in a catalogue (cards.toml), for which a run can be planned.

The CUDA context takes memory outside of PyTorch's allocator. It is given as an interval by compute
capability, from published measurements: T4 105 to 135 MiB (torch 2.11, lazy loading), Titan V 320
to 1,008 MiB (pytorch #28394), V100 1,343 MiB (2022), RTX 2080 Ti 1,035 and RTX 3090 1,644 MiB
(before lazy loading, pytorch #49877), A100 863 MiB (2023), RTX A6000 0.75 GB (CUDA 13), 0.20 GiB on
24 GB cards (vLLM #14447), H100 0.16 GiB (vLLM #12126), about 300 MiB in general since lazy loading
(pytorch #107667). A measured value is always better.

Card and host are connected by PCI Express 3 (8 GT/s, 128b/130b: 0.985 GB/s per lane and direction)
until Turing, 4 with Ampere and Ada, and 5 since Hopper. A slot may have less.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from typing import Literal

from fitune.errors import UsageError
from fitune.units import GIB, MIB

GB = 1000**3


@dataclass(frozen=True)
class ContextPrior:
    """The memory of the CUDA context before anything is measured, as a published range."""

    low_bytes: int
    expected_bytes: int
    high_bytes: int


@dataclass(frozen=True)
class Device:
    """A card or the machine's memory. What is not known is None."""

    name: str
    #: regular expression of the card's names, in lower case without spaces and NVIDIA's own words
    pattern: str
    #: memory as sold, in units of 2**30
    box_bytes: int
    #: what CUDA reports
    total_bytes: int
    compute_capability: tuple[int, int] | None = None
    #: peak rates
    bandwidth_bytes_per_second: float | None = None
    float16_flops_per_second: float | None = None
    float32_flops_per_second: float | None = None
    link_bytes_per_second: float | None = None
    multiprocessors: int | None = None
    context: ContextPrior | None = None
    kind: Literal["cuda", "cpu"] = "cuda"
    uuid: str | None = None
    #: now; None for a card of the catalogue
    free_bytes: int | None = None
    #: now, by all processes; None for a card of the catalogue
    used_bytes: int | None = None

    @property
    def bfloat16_flops_per_second(self) -> float | None:
        """The float16 rate; None before compute capability 8.0, where bfloat16 is missing."""
        has_bfloat16 = self.compute_capability is not None and self.compute_capability >= (8, 0)
        return self.float16_flops_per_second if has_bfloat16 else None


#: MiB (lowest, expected, highest) by lowest compute capability; see the module's docstring
_CONTEXTS = {
    (6, 0): (300, 320, 1343),
    (7, 5): (105, 135, 1035),
    (8, 0): (205, 863, 1343),
    (8, 6): (205, 715, 1644),
    (8, 9): (205, 300, 900),
    (9, 0): (164, 300, 900),
    (10, 0): (150, 300, 900),
}


def context_prior(compute_capability: tuple[int, int]) -> ContextPrior:
    """Return the interval of the card's family; older cards get the oldest family's."""
    rows = [row for lowest, row in _CONTEXTS.items() if lowest <= compute_capability]
    low, expected, high = rows[-1] if rows else _CONTEXTS[6, 0]
    return ContextPrior(low * MIB, expected * MIB, high * MIB)


#: GB/s per lane by lowest compute capability; see the module's docstring
_LANES = {(6, 0): 0.985, (8, 0): 1.969, (9, 0): 3.938}


def _lane_bandwidth(compute_capability: tuple[int, int]) -> float:
    return GB * next(
        rate for lowest, rate in reversed(_LANES.items()) if lowest <= compute_capability
    )


def _read_catalogue() -> Iterator[Device]:
    text = (files("fitune.machine") / "cards.toml").read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        major, minor = row["capability"]
        yield Device(
            name=name,
            pattern=row["pattern"],
            box_bytes=row["memory"] * GIB,
            total_bytes=int(row["visible"] * GIB),
            compute_capability=(major, minor),
            bandwidth_bytes_per_second=row["bandwidth"] * GB,
            float16_flops_per_second=row["float16"] * 1e12,
            float32_flops_per_second=row["float32"] * 1e12,
            link_bytes_per_second=row.get("lanes", 16) * _lane_bandwidth((major, minor)),
            multiprocessors=row["multiprocessors"],
            context=context_prior((major, minor)),
        )


CATALOGUE = tuple(_read_catalogue())


_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|graphics|gpu|generation|(workstation|server) edition|max q|hbm\d*e?|gddr\d\w?"
)
_MEMORY = re.compile(r"(?<![\da-z])(\d{1,3}) ?g(i?b)?(?![a-z])")


def _name_and_memory(text: str) -> tuple[str, int | None]:
    """Normalise a name as the patterns expect it, and find the GB that it mentions.

    Example: 'NVIDIA A100-SXM4-80GB' -> ('a100sxm4', 80).
    """
    normalised = _NOISE.sub(" ", text.lower().replace("-", " ").replace("_", " "))
    memory = _MEMORY.search(normalised)
    return re.sub(r"[^a-z0-9]", "", _MEMORY.sub(" ", normalised)), int(
        memory[1]
    ) if memory else None


def _rows(text: str) -> list[Device]:
    name, memory = _name_and_memory(text)
    rows = [row for row in CATALOGUE if re.fullmatch(row.pattern, name)]
    return [row for row in rows if memory in (None, row.box_bytes // GIB)]


def find_card(text: str) -> Device:
    """Find the card that a user means, for example by 'RTX 4090', '4090' or 'a100 80gb'.

    Raises UsageError if the card is unknown or ambiguous.
    """
    rows = _rows(text)
    if len(rows) == 1:
        return rows[0]
    if rows:
        raise UsageError(
            f"'{text}' can be {' or '.join(row.name for row in rows)}: name one of them"
        )
    wanted, _ = _name_and_memory(text)
    keys = {_name_and_memory(row.name)[0]: row.name for row in CATALOGUE}
    keys |= {key.removeprefix("rtx"): name for key, name in keys.items()}
    same = [row.name for row in CATALOGUE if re.fullmatch(row.pattern, wanted)]
    close = same or list(
        dict.fromkeys(keys[key] for key in get_close_matches(wanted, keys, n=3, cutoff=0.7))
    )
    known = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"known: {', '.join(row.name for row in CATALOGUE)}."
    )
    raise UsageError(
        f"unknown card '{text}': {known} For any other card set memory.budget, like 20GiB"
    )


def named_card(name: str, total_bytes: int, capability: tuple[int, int] | None) -> Device:
    """Describe a card of this machine by what the catalogue says about cards with its name.

    total_bytes: 0 if it is unknown.
    """
    unknown = Device(name=name, pattern="", box_bytes=total_bytes, total_bytes=total_bytes)
    # Of cards with the same name, take the one with the closest memory; a card may have more memory
    # than any with its name was ever sold with.
    row = min(_rows(name), key=lambda row: abs(row.total_bytes - total_bytes), default=unknown)
    capability = capability or row.compute_capability
    return replace(
        row,
        name=name,
        box_bytes=max(row.box_bytes, total_bytes),
        total_bytes=total_bytes or row.total_bytes,
        compute_capability=capability,
        context=context_prior(capability) if capability else None,
    )
