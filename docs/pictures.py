"""The pictures of README and of the pages, as a browser has drawn them: a plan in the terminal, a report, the board's runs.

python docs/pictures.py         docs/plan.png, report.png and board-runs*.png, in some minutes
python docs/pictures.py runs    those of the report and of the board alone

The runs are of the tests' model of 2.2 M, from random weights, on their made-up dialogues, with three learning rates.
Needs Chromium (apt-get install chromium). A picture of 200 kB or more is refused.
"""

import argparse
import io
import shutil
import subprocess
import sys
import time
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
model: {source: model, init: random}
data: {train: sft.jsonl, max_length: 64, eval_fraction: 0.05}
batch: {effective: 16}
train: {steps: 120, eval_every: 20}
"""
#: the name of a run -> its learning rate
RATES = {"slow": "3e-4", "middle": "1e-3", "fast": "3e-3"}
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


def train(directory: Path) -> None:
    """Train the runs of RATES in `directory`/runs."""
    from tiny_run import WIDE_VOCABULARY, save_tiny_model, write_dialogues

    save_tiny_model(directory / "model", WIDE_VOCABULARY)
    write_dialogues(directory / "sft.jsonl", 2000)
    (directory / "sft.yaml").write_text(RUN)
    for name, rate in RATES.items():
        words = ["train", "sft.yaml", f"run.name={name}", f"optim.lr={rate}"]
        subprocess.run([sys.executable, "-m", "fitune", *words], cwd=directory, check=True)


def draw_runs(directory: Path) -> None:
    """Draw the report of the runs, and the board that shows them."""
    from browser import browser

    command = [sys.executable, "-m", "fitune"]
    subprocess.run([*command, "report", *RATES, "-o", "report.html"], cwd=directory, check=True)
    server = subprocess.Popen(
        [*command, "board", "runs", "--port", "0"],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    board = server.stdout.readline().strip()
    chosen = "%0A".join(RATES)
    try:
        with browser() as tab:
            for name, width, height, dark, language in (
                ("report", 1100, 940, False, "en"),
                ("board-runs", 1280, 920, False, "en"),
                ("board-runs-dark", 1280, 900, True, "zh"),
                ("board-runs-phone", 390, 1400, False, "en"),
            ):
                tab.size(width, height, dark=dark)
                tab.open("about:blank")
                tab.open((directory / "report.html").as_uri() if name == "report" else board)
                tab.wait("typeof fitune === 'object'")
                if name != "report":
                    tab.run(f"fitune.language = '{language}'; location.hash = '#/runs/{chosen}'")
                tab.wait("document.querySelectorAll('.plot[data-drawn]').length > 1")
                time.sleep(3)
                tab.picture(DOCS / f"{name}.png")
                check_size(DOCS / f"{name}.png")
    finally:
        server.terminate()
        server.wait()


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
    check_size(picture)


def check_size(picture: Path) -> None:
    """Raise SystemExit where the picture is too large for a page."""
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
    parser.add_argument("what", nargs="?", choices=("all", "runs"), default="all")
    what = parser.parse_args().what
    sys.path[:0] = [str(DOCS.parent / name) for name in ("tests", "tests/board")]
    with TemporaryDirectory() as directory:
        if what == "all":
            text, num_lines = plan_page()
            page = Path(directory) / "plan.html"
            page.write_text(text, encoding="utf-8")
            draw(page, DOCS / "plan.png", width=980, height=32 + round(18.2 * (num_lines + 4)))
        train(Path(directory))
        draw_runs(Path(directory))


if __name__ == "__main__":
    main()
