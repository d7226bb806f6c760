"""Load data sets from the Hugging Face Hub, and tell early whether the hub can be reached at all.

Without a network huggingface_hub tries each file six times over half a minute before it reports a
failure. `hub_is_known` checks the network once, before anything is fetched, so a user who is
offline or has mistyped a path gets the error at once. Files in the local cache are used in any
case.
"""

import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from fitune.data.splits import SUFFIXES, Split, suffix_of
from fitune.errors import DataError


@lru_cache(maxsize=1)
def hub_is_known() -> bool:
    """Return whether the host name of HF_ENDPOINT can be resolved.

    Behind a proxy the proxy resolves the name, so the result is True.
    """
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies().get(endpoint.scheme):
        return True
    try:
        socket.getaddrinfo(endpoint.hostname, endpoint.port)
    except OSError:
        return False
    return True


def is_hub_id(path: str) -> bool:
    """Return whether the path looks like a hub id ("name" or "owner/name") and is no local file."""
    return (
        re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        and suffix_of(Path(path)) not in SUFFIXES
        and not Path(path).expanduser().exists()
    )


def load_from_hub(path: str, split: Split) -> Any:
    """Return the `datasets.Dataset` of a split on the hub, or of its local cache.

    For evaluation the first existing split of validation, valid, dev, test and train is taken.
    Raises DataError if the data set cannot be loaded or has no such split.
    """
    import datasets

    if not hub_is_known():
        # Only the cache is used, and nothing is retried for half a minute.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        if split == "train":
            return datasets.load_dataset(path, split="train")
        found = datasets.load_dataset(path)
        name = next(
            (name for name in ("validation", "valid", "dev", "test", "train") if name in found),
            None,
        )
        if name is None:
            raise DataError(
                f"the dataset {path} has no split to evaluate with, only {', '.join(found)}"
            )
        return found[name]
    # All exceptions of datasets and huggingface_hub derive from these.
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"no data at {path}: there is no such file or directory, and it cannot be loaded from the hub ({reason})"
        ) from error
