"""Puts the page together: its HTML, and the files of assets/ that it is made of."""

import html
import json
from functools import cache
from importlib import resources

from fitune.language.chinese import CHINESE

PLOTLY = "plotly-basic-4.1.1.min.js.gz"
STYLES = ("board.css", "runs.css")
#: in the order in which they run; `shell.js` defines the namespace that the others use
SCRIPTS = ("shell.js", "plan.js", "charts.js", "runs.js")
#: the id of the element with the Chinese of the page's sentences
WORDS_ID = "fitune-words"


@cache
def asset(name: str) -> str:
    """Return the text of a style sheet or script of the page."""
    return (resources.files("fitune.board") / "assets" / name).read_text(encoding="utf-8")


def plotly_gz() -> bytes:
    """Return plotly's basic bundle (MIT) in gzip; its Python package has only the full bundle."""
    return (resources.files("fitune.report") / "assets" / PLOTLY).read_bytes()


def words() -> str:
    """Return the Chinese of the page's sentences, as JSON that is safe in a script element."""
    return json.dumps(CHINESE, ensure_ascii=False).replace("<", "\\u003c")


def board_page() -> str:
    """Return the HTML of the page, which loads its scripts from the server."""
    styles = "".join(f'<link rel="stylesheet" href="/assets/{name}">' for name in STYLES)
    scripts = "".join(f'<script src="/assets/{name}" defer></script>' for name in SCRIPTS)
    return document(f"{styles}{scripts}", title="fitune")


def document(head: str, *, title: str, body: str = "", language: str = "") -> str:
    """Return an HTML document that the scripts fill.

    head, body: HTML, which is not escaped.
    language: the page's only language; empty for a page whose reader may choose.
    """
    fixed = f' data-language="{language}"' if language else ""
    return f"""<!DOCTYPE html>
<html lang="{language or "en"}"{fixed}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<script type="application/json" id="{WORDS_ID}">{words()}</script>
{head}
</head>
<body>
<a class="skip" id="skip" href="#main"></a>
<header id="top"></header>
<main id="main" tabindex="-1"></main>
<p id="fault" role="alert"></p>
{body}
</body>
</html>
"""
