"""Shows objects in a notebook.

The functions that render an object import its class, so the class cannot import them; they are
registered here.
"""

from collections.abc import Callable

#: name of a class -> function that returns the HTML of an object; `fitune/__init__.py` fills it
RENDERERS: dict[str, Callable[[object], str]] = {}


class HtmlDisplay:
    """An object that a notebook shows as HTML if a renderer is registered for its class."""

    def _repr_html_(self) -> str | None:
        render = RENDERERS.get(type(self).__name__)
        return None if render is None else render(self)
