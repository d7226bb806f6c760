"""Render the help of the verbs in the chosen language, by cyclopts with translated text."""

import re
from typing import Any

from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel
from rich.text import Text

from fitune.language import choose_language, say, translated

_WITH_KEY = re.compile(r"(.*) \(([a-z_]+\.[a-z_.]+)\)", re.DOTALL)


class HelpText(DefaultFormatter):
    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        if choose_language() != "en":
            entries = [_translated_entry(entry) for entry in panel.entries]
            panel = panel.copy(title=say(_plain(panel.title)), entries=entries)
        super().__call__(console, options, panel)

    def render_usage(self, console: Any, options: Any, usage: object) -> None:
        if usage and choose_language() != "en":
            words = str(usage).strip().removeprefix("Usage:").strip()
            console.print(Text(say("Usage: {words}", words=words), style="bold"))
        else:
            super().render_usage(console, options, usage)

    def render_description(self, console: Any, options: Any, description: object) -> None:
        if description and choose_language() != "en":
            description = Text(f"{translated(_plain(description))}\n")
        super().render_description(console, options, description)


def _plain(content: object) -> str:
    return str(getattr(content, "primary_renderable", content)).rstrip()


def _translated_entry(entry: HelpEntry) -> HelpEntry:
    """Translate a parameter's help, and move choices and 'required' into its description.

    cyclopts would add both in English.
    """
    text = _plain(entry.description or "")
    with_key = _WITH_KEY.fullmatch(text)
    description = translated(text)
    if with_key and description == text:
        description = f"{translated(with_key[1])}（{with_key[2]}）"
    if entry.choices:
        description += say(" (one of {choices})", choices=", ".join(entry.choices))
    if entry.required:
        description += say(" (required)")
    return entry.copy(description=Text(description), choices=(), required=False)
