"""Caches the results of a plan as JSON, so that a second plan needs neither the model nor torch.

The files are in FITUNE_CACHE, else in the user's cache directory. A key contains everything that
the value depends on; the versions of fitune and of the packages that it records with are part of
every key. A cache that cannot be read or written is treated as empty.
"""

import contextlib
import json
import os
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs

import fitune
from fitune.boundary import parse_json

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def cached(kind: str, key: object, make: Callable[[], object]) -> Any:
    """Return the JSON value of `key` from the directory `kind` of the cache.

    If there is none, `make` computes it, and it is stored.
    """
    found = read_cached(kind, key)
    if found is None:
        found = make()
        write_cached(kind, key, found)
    return found


def read_cached(kind: str, key: object) -> Any | None:
    try:
        return parse_json(_path(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_cached(kind: str, key: object, value: object) -> None:
    path = _path(kind, key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(value), encoding="utf-8")
        unfinished.replace(path)


def file_state(path: str | Path) -> list[Any]:
    """Return a value that changes when the file, or a file of the directory, changes."""
    root = Path(path).expanduser()
    files = sorted(file for file in root.iterdir() if file.is_file()) if root.is_dir() else [root]
    states = []
    for file in files:
        with contextlib.suppress(OSError):
            state = file.stat()
            states.append([str(file), state.st_size, state.st_mtime_ns])
    return states


def _path(kind: str, key: object) -> Path:
    root = Path(os.environ.get("FITUNE_CACHE") or platformdirs.user_cache_path("fitune"))
    text = json.dumps([_versions(), key], sort_keys=True, default=str)
    return root / kind / f"{blake2b(text.encode(), digest_size=16).hexdigest()}.json"


@cache
def _versions() -> list[str]:
    """Return the versions of fitune and of the packages that it records with."""
    # the newest change of fitune's files counts too, for those who develop it
    own = max(file.stat().st_mtime_ns for file in Path(fitune.__file__).parent.rglob("*.py"))
    found = [fitune.__version__, str(own)]
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found
