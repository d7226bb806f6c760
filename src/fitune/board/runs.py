"""Answers what the Runs view asks."""

from pathlib import Path

from starlette.routing import BaseRoute


def routes(directory: Path) -> list[BaseRoute]:
    """Return the routes of the Runs view. directory: where the runs are."""
    return []
