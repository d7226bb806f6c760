"""Parses and formats quantities as users write and read them.

Inside the program a quantity is an int of bytes or a float of seconds.
"""

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTES = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
_BYTES |= {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str) -> int:
    """Parse a size: '20GiB' -> 21474836480.

    Raises ValueError for anything that is not a number with a unit of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].lower() not in _BYTES:
        raise ValueError(f"'{text}' is not a size in bytes; write it like 20GiB or 512MiB")
    return int(float(match[1]) * _BYTES[match[2].lower()])


def parse_seconds(text: str) -> float:
    """Parse a duration like '11h', '90m', '1h30m' or '45s', and return seconds.

    Raises ValueError for anything else.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        raise ValueError(f"'{text}' is not a duration; write it like 11h, 90m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def format_bytes(num_bytes: int | None) -> str:
    """Return a size as text: 21474836480 -> '20.0 GiB', below one GiB in MiB, None -> 'n/a'."""
    if num_bytes is None:
        return "n/a"
    return f"{num_bytes / GIB:.1f} GiB" if abs(num_bytes) >= GIB else f"{num_bytes / MIB:.1f} MiB"


def format_gib(num_bytes: int | None, decimals: int = 2) -> str:
    """Return a size in GiB without the unit, for tables whose heading has the unit."""
    return "n/a" if num_bytes is None else f"{num_bytes / GIB:.{decimals}f}"


def format_count(number: float | None) -> str:
    """Return a count as text: 104_000_000 -> '104.0 M', None -> 'n/a'."""
    if number is None:
        return "n/a"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,.0f}"


def format_seconds(seconds: float | None) -> str:
    """Return a duration as text: 3725 -> '1h02m', 61 -> '1m01s', 2.5 -> '2.5s', None -> 'n/a'."""
    if seconds is None:
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"
