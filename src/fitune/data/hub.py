"""Whether the model hub can be reached at all, asked once and before anything is fetched.

Without a network huggingface_hub tries each file six times over half a minute before it says so. Whoever is offline,
or has mistyped a path, is told at once; what lies in the cache is used all the same.
"""

import socket
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


@lru_cache(maxsize=1)
def hub_is_known() -> bool:
    """False where the name of HF_ENDPOINT's host cannot be resolved. Behind a proxy the proxy resolves it: True."""
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies().get(endpoint.scheme):
        return True
    try:
        socket.getaddrinfo(endpoint.hostname, endpoint.port)
    except OSError:
        return False
    return True
