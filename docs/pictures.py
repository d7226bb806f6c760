"""The two pictures of README, as files that a browser has drawn: a plan in the terminal, and the page of a report.

python docs/pictures.py                            docs/plan.png and docs/report.png, in about two minutes
python docs/pictures.py demo/three/report.html     the second one of that page instead

The report is of a run of minimind2-small, from random weights, on made-up dialogues of the tests.
Needs Chromium (apt-get install chromium). A picture of 200 kB or more is refused.
"""

import argparse
import io
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.terminal_theme import MONOKAI

from fitune.cli.output import Screen
from fitune.cli.plan_table import show_plan
from fitune.config import read_config
from fitune.planning.search import choose_plan

DOCS = Path(__file__).parent
MOST_BYTES = 200_000
COMMAND = 'fitune plan minimind2 --gpu "RTX 4090"'
RUN = """
model: {source: minimind2-small, init: random, tokenizer: tokenizer}
data: {train: sft.jsonl, max_length: 128}
batch: {effective: 16}
train: {steps: 30}
run: {name: first}
"""
PAGE = (
    '<meta charset="utf-8"><body style="margin:0;background:{background}">'
    '<pre style="margin:0;padding:16px;white-space:pre-wrap;color:{foreground};'
    "font:14px/1.3 'DejaVu Sans Mono',monospace\">{code}</pre>"
)


def plan_page() -> tuple[str, int]:
    """The plan of COMMAND as a page, and how many lines it has before any is folded."""
    config = read_config({"model": {"source": "minimind2"}, "data": {"train": "none"}}).config
    plan = choose_plan(config, gpu="RTX 4090", search="brief")
    screen = Screen(file=io.StringIO(), record=True, width=112, force_terminal=True)
    screen.print(f"$ {COMMAND}", style="bold")
    show_plan(plan, screen)
    num_lines = screen.export_text(clear=False).count("\n")
    return screen.export_html(theme=MONOKAI, code_format=PAGE, inline_styles=True), num_lines


def run_page(directory: Path) -> Path:
    """The report of a run that is trained for it."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from byte_tokenizer import byte_tokenizer
    from tiny_run import write_dialogues

    byte_tokenizer().save_pretrained(directory / "tokenizer")
    write_dialogues(directory / "sft.jsonl", 400)
    (directory / "sft.yaml").write_text(RUN)
    for words in (["train", "sft.yaml"], ["report", "first", "-o", "first.html"]):
        subprocess.run([sys.executable, "-m", "fitune", *words], cwd=directory, check=True)
    return directory / "first.html"


def draw(page: Path, picture: Path, *, width: int, height: int) -> None:
    """Raises SystemExit where there is no Chromium or the picture is too large for a README."""
    browser = next(
        (
            path
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (path := shutil.which(name))
        ),
        None,
    )
    if browser is None:
        raise SystemExit("there is no Chromium to draw with: apt-get install chromium")
    with TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--hide-scrollbars", f"--user-data-dir={profile}", f"--window-size={width},{height}",
             "--virtual-time-budget=8000", f"--screenshot={picture.resolve()}", page.resolve().as_uri()],
            check=True, capture_output=True, timeout=240,
        )  # fmt: skip
    size = picture.stat().st_size
    if size >= MOST_BYTES:
        raise SystemExit(
            f"{picture} has {size:,} bytes, {MOST_BYTES:,} or more: draw less of the page"
        )
    print(f"{picture}: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "report", nargs="?", type=Path, help="a page that `fitune report` or a sweep has written"
    )
    arguments = parser.parse_args()
    text, num_lines = plan_page()
    with TemporaryDirectory() as directory:
        page = Path(directory) / "plan.html"
        page.write_text(text, encoding="utf-8")
        draw(page, DOCS / "plan.png", width=980, height=32 + round(18.2 * (num_lines + 4)))
        draw(
            arguments.report or run_page(Path(directory)),
            DOCS / "report.png",
            width=1100,
            height=1250,
        )


if __name__ == "__main__":
    main()
