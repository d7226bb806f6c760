"""Puts the page together: its HTML, and the files of assets/ that it is made of."""

import gzip
import html
import json
from functools import cache
from importlib import resources

from fitune.language.chinese import CHINESE

PLOTLY = "plotly-basic-4.1.1.min.js.gz"
STYLES = ("board.css",)
#: in the order in which they run; `shell.js` defines the namespace that the others use
SCRIPTS = ("shell.js", "plan.js", "runs.js")
#: the id of the element with the Chinese of the page's sentences
WORDS_ID = "fitune-words"


@cache
def asset(name: str) -> str:
    """Return the text of a style sheet or script of the page; "plotly.js" is plotly's bundle."""
    if name == "plotly.js":
        bundle = resources.files("fitune.report") / "assets" / PLOTLY
        return gzip.decompress(bundle.read_bytes()).decode()
    return (resources.files("fitune.board") / "assets" / name).read_text(encoding="utf-8")


def words() -> str:
    """Return the Chinese of the page's sentences, as JSON that is safe in a script element."""
    return json.dumps(CHINESE, ensure_ascii=False).replace("<", "\\u003c")


def board_page() -> str:
    """Return the HTML of the page, which loads its scripts from the server."""
    styles = "".join(f'<link rel="stylesheet" href="/assets/{name}">' for name in STYLES)
    scripts = "".join(f'<script src="/assets/{name}" defer></script>' for name in SCRIPTS)
    return document(f"{styles}{scripts}", title="fitune")


def document(head: str, *, title: str, body: str = "") -> str:
    """Return an HTML document that the scripts fill. head, body: HTML, which is not escaped."""
    return f"""<!DOCTYPE html>
<html lang="en">
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
