"""Writes runs as one HTML file that contains all it needs: the board's page, its scripts, its data.

The file is safe with any data: the page's text is set as text by its scripts, JSON is embedded with
every '<' written as \\u003c, and the content security policy allows only these scripts, by their
hashes, and no requests.
"""

import base64
import gzip
import hashlib
import json
from pathlib import Path

from fitune.board.page import asset, document, plotly_gz
from fitune.language import choose_language
from fitune.report.charts import FEWEST_RUN_POINTS
from fitune.report.compare import Comparison
from fitune.report.document import page_content
from fitune.report.embedded import EMBEDDED_ID, embed
from fitune.run.files import OUTPUT_KEY, write_atomically

#: the id of the element with the page of the runs as JSON
PAGE_ID = "fitune-page"
#: of the curves of all runs that a report contains
MAX_EMBEDDED_POINTS = 6000
_SCRIPTS = ("shell.js", "charts.js", "runs.js")
_STYLES = ("board.css", "runs.css")


def write_page(comparison: Comparison, path: Path, *, place: str = OUTPUT_KEY) -> None:
    """Write the report to `path`.

    place: the option with which the user gave the path, for error messages.
    Raises RunDirectoryError if the report cannot be written.
    """
    write_atomically(path, offline_page(comparison), place=place)


def offline_page(comparison: Comparison) -> str:
    """Return the HTML of a report, in the language of `choose_language`.

    Raises RunDirectoryError if the runs' files contain other values than a run writes.
    """
    page = page_content(comparison)
    runs = [row.run for row in comparison.rows]
    # to be compared again
    most = max(MAX_EMBEDDED_POINTS // len(runs), FEWEST_RUN_POINTS)
    data = {"schema": 1, "runs": [embed(run, max_points=most) for run in runs]}
    scripts = [_inline(gzip.decompress(plotly_gz()).decode()), *map(_script, _SCRIPTS)]
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    styles = "\n".join(asset(name) for name in _STYLES)
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{styles}</style>'
    )
    embedded = {PAGE_ID: page, EMBEDDED_ID: data}
    parts = [
        *(
            f'<script type="application/json" id="{key}">{_json(content)}</script>'
            for key, content in embedded.items()
        ),
        *(f"<script>{text}</script>" for text in scripts),
    ]
    return document(
        head,
        title=f"{page['title']} - fitune",
        body="\n".join(parts),
        language=choose_language(),
    )


def _script(name: str) -> str:
    return _inline(asset(name))


def _inline(script: str) -> str:
    """Return a script without text that would end its element early.

    The text '</script' may be in one of plotly's strings.
    """
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(content: object) -> str:
    text = json.dumps(
        content, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False
    )
    for character, written in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, written)
    return text.encode("utf-8", "replace").decode()
