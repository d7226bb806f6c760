"""Parse the value of PYTORCH_ALLOC_CONF (older name: PYTORCH_CUDA_ALLOC_CONF) as PyTorch 2.14 does.

Keys and limits are those of c10/core/AllocatorConfig and c10/cuda/CUDAAllocatorConfig. Two inputs
that PyTorch accepts are refused, because neither can be what was meant: a number with a tail
("64.5", "64x"), of which PyTorch uses the leading digits, and a key that is given twice.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise

from fitune.errors import UsageError
from fitune.units import MIB

#: Sizes from 1 MiB, 2 MiB, ... 32 GiB on each have their own number of divisions
NUM_INTERVALS = 16


@dataclass(frozen=True)
class AllocatorConfig:
    """The settings that change where device memory is allocated; the defaults are PyTorch's."""

    #: blocks of this size or larger are never split; with None every block may be
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = 20 * MIB
    large_segment_bytes: int = 20 * MIB
    #: for each interval of floor(log2(size in MiB)), into how many steps a power of two is divided
    #: when a size is rounded up; 0 and 1 round to 512 bytes
    roundup_divisions: tuple[int, ...] = (0,) * NUM_INTERVALS
    #: the share of the memory limit above which old cached blocks are released; 0 for never
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    #: the share of the card that may be reserved
    memory_fraction: float = 1.0


# Settings of host memory, locks and CUDA graphs. They never move a block of device memory, so they
# are checked and then ignored.
_SWITCHES = (
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
)
_HOST_NUMBERS = (
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
)
_KEYS = (
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "roundup_power2_divisions",
    "throw_on_cudamalloc_oom",
    *_SWITCHES,
    *_HOST_NUMBERS,
)


def parse_allocator_config(text: str) -> AllocatorConfig:
    """Parse text such as 'max_split_size_mb:128,expandable_segments:True'; '' gives the defaults.

    Raises UsageError for an unknown key, a value out of its range, or a backend that cannot be
    replayed.
    """
    settings = dict(_settings(text))
    for key in set(settings) & set(_SWITCHES):
        _switch(key, settings[key])
    for key in set(settings) & set(_HOST_NUMBERS):
        _whole(key, settings[key])
    if settings.get("backend", "native") != "native":
        raise UsageError(
            f"allocator setting backend:{settings['backend']} cannot be predicted: only PyTorch's "
            "native allocator is known exactly; remove it"
        )
    if _switch("throw_on_cudamalloc_oom", settings.get("throw_on_cudamalloc_oom", "False")):
        raise UsageError(
            "allocator setting throw_on_cudamalloc_oom:True is not modelled: it fails before it tries; remove it"
        )
    segment_mb = _at_least("large_segment_size_mb", settings, smallest=11, default=20)
    split_mb = _at_least("max_split_size_mb", settings, smallest=segment_mb, default=0)
    rounding_mb = _at_least(
        "max_non_split_rounding_mb", settings, smallest=segment_mb, default=segment_mb
    )
    threshold = _number("garbage_collection_threshold", settings, default=0.0)
    if "garbage_collection_threshold" in settings and not 0 < threshold < 1:
        raise UsageError(
            f"allocator setting garbage_collection_threshold is {threshold:g}, but must lie between 0 and 1"
        )
    fraction = _number("per_process_memory_fraction", settings, default=1.0)
    if not 0 <= fraction <= 1:
        raise UsageError(
            f"allocator setting per_process_memory_fraction is {fraction:g}, but must be from 0 to 1"
        )
    return AllocatorConfig(
        max_split_bytes=split_mb * MIB or None,
        max_non_split_rounding_bytes=rounding_mb * MIB,
        large_segment_bytes=segment_mb * MIB,
        roundup_divisions=_divisions(settings.get("roundup_power2_divisions")),
        garbage_collection_threshold=threshold,
        expandable_segments=_switch(
            "expandable_segments", settings.get("expandable_segments", "False")
        ),
        memory_fraction=fraction,
    )


def _settings(text: str) -> Iterator[tuple[str, str]]:
    """Yield the key and value of each 'key:value' part of the text.

    Commas inside brackets do not separate parts.
    """
    compact = "".join(text.split())
    if digits := re.search(r"\d{20}", compact):
        raise UsageError(
            f"allocator setting with the number {digits[0]}...: no setting has so many digits"
        )
    depth, cuts = 0, [-1]
    for i, char in enumerate(compact):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            cuts.append(i)
    cuts += [] if compact.endswith(",") else [len(compact)]
    seen = set()
    for part in (compact[start + 1 : end] for start, end in pairwise(cuts)) if compact else ():
        key, colon, value = part.partition(":")
        if not colon or not value:
            raise UsageError(f"allocator setting '{part}' has no value; write key:value,key:value")
        if key not in _KEYS:
            close = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(_KEYS))}"
            raise UsageError(f"unknown allocator setting '{key}': {hint}")
        if key in seen:
            raise UsageError(f"allocator setting {key} is given twice: keep one")
        seen.add(key)
        yield key, value


def _divisions(value: str | None) -> tuple[int, ...]:
    """Return the number of divisions for each size interval.

    '4' means 4 for every interval. In '[1:2,16:4,>:8]' each key is a size in MiB, and '>' stands
    for all sizes above the key before it. The first key's value also applies to all smaller sizes.
    Intervals that are not named are not rounded to divisions.
    """
    key = "roundup_power2_divisions"
    if value is None:
        return (0,) * NUM_INTERVALS
    if not value.startswith("["):
        number = _whole(key, value)
        if not _is_power_of_two(number):
            raise UsageError(f"allocator setting {key} is {number}, but must be a power of two")
        return (number,) * NUM_INTERVALS
    if not value.endswith("]"):
        raise UsageError(
            f"allocator setting {key}:{value} has no closing bracket; write [256:1,512:2,>:4]"
        )
    table = [0] * NUM_INTERVALS
    last, is_first = 0, True
    for entry in filter(None, value[1:-1].split(",")):
        start, _, text = entry.partition(":")
        number = _whole(key, text)
        if number and not _is_power_of_two(number):
            raise UsageError(
                f"allocator setting {key} has {number} divisions, but must have a power of two, or 0"
            )
        if start == ">":
            table[last + 1 :] = [number] * (NUM_INTERVALS - last - 1)
            continue
        size_mb = _whole(key, start)
        if not _is_power_of_two(size_mb):
            raise UsageError(
                f"allocator setting {key} has the size {size_mb} MiB, but must have a power of two"
            )
        last = min(size_mb.bit_length() - 1, NUM_INTERVALS - 1)
        if is_first:
            table[:last] = [number] * last
            is_first = False
        table[last] = number
    return tuple(table)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _whole(key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"allocator setting {key} has '{value}' where a whole number is needed")
    return int(value)


def _at_least(key: str, settings: dict[str, str], *, smallest: int, default: int) -> int:
    if key not in settings:
        return default
    number = _whole(key, settings[key])
    if number < smallest:
        raise UsageError(f"allocator setting {key} is {number}, but must be at least {smallest}")
    return number


def _number(key: str, settings: dict[str, str], *, default: float) -> float:
    try:
        return float(settings.get(key, default))
    except ValueError:
        raise UsageError(
            f"allocator setting {key} is '{settings[key]}', which is not a number"
        ) from None


def _switch(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise UsageError(f"allocator setting {key} is '{value}', but must be True or False")
    return value == "True"
