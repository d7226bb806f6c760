"""Shows an object in a notebook. What draws it is above it in the house, and is registered here."""

from collections.abc import Callable
from typing import Any

RENDERERS: dict[str, Callable[[Any], str]] = {}
"""By the name of a class: returns the HTML of an object. `fitune/__init__.py` fills it."""


class HtmlDisplay:
    """An object that a notebook shows as HTML, where a renderer for its class is registered."""

    def _repr_html_(self) -> str | None:
        render = RENDERERS.get(type(self).__name__)
        return None if render is None else render(self)
