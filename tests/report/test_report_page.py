"""The report: safe with any data, small, whole; and drawn by a real browser where one is installed."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fitune.board.offline import offline_page as page
from fitune.cli.app import main
from fitune.report.charts import pictures
from fitune.report.compare import compare
from fitune.report.embedded import read_report
from fitune.report.verdicts import verdicts
from fitune.run.directory import RunDirectory
from fitune.run.files import write_json
from fitune.run.metrics import RunEvent
from written_runs import GIB, Recipe, add_memory, add_plan, three_configurations, write_run

NASTY = "</script><script>document.title='run by data'</script><img src=x onerror=alert(1)> & \"q\" 'a' مرحبا 🦊 \x00\ud800"
MOST_BYTES = 3_000_000
CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every picture in it."""
    directory = tmp_path_factory.mktemp("whole")
    runs = three_configurations(directory)
    add_memory(runs[0])
    add_plan(runs[0])
    metrics = RunDirectory(runs[1]).metrics
    text = metrics.read_text().replace('"noise_scale_tokens": null', '"noise_scale_tokens": 4200.0')
    metrics.write_text(text)
    path = directory / "report.html"
    path.write_text(page(compare(runs)))
    return path


class Tags(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_every_picture_of_the_design_is_there(whole: Path) -> None:
    keys = {picture.key.partition("-")[0] for picture in pictures(compare([whole]))}
    assert keys == {
        "loss",
        "memory",
        "predicted",
        "microscope",
        "pareto",
        "lengths",
        "lr",
        "grad_norm",
        "noise",
    }
    text = whole.read_text()
    for words in (
        "Settings that differ",
        "Advice",
        "Events",
        "are the same run",
        "fitune train ",
        "model.layers.3.mlp",
    ):
        assert words in text


def test_only_the_two_scripts_of_the_page_may_run_and_nothing_be_fetched(whole: Path) -> None:
    parser = Tags()
    parser.feed(whole.read_text())
    policy = (
        next(
            a["content"]
            for tag, a in parser.tags
            if a.get("http-equiv") == "Content-Security-Policy"
        )
        or ""
    )
    kinds = [a.get("type") for tag, a in parser.tags if tag == "script"]
    code = [text for kind, text in zip(kinds, parser.scripts, strict=True) if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert policy.startswith("default-src 'none'; script-src ")
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    for tag, attributes in parser.tags:
        assert not {"src", "onerror", "onload", "onclick", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """100,000 steps, names and messages that attack, and one moment of high memory; the report, and its seconds."""
    directory = tmp_path_factory.mktemp("hostile")
    run = RunDirectory(
        write_run(
            directory,
            "run",
            Recipe(steps=1, settings={"model": {"source": NASTY[:-1], "template": "x" * 10**6}}),
        )
    )
    line = run.metrics.read_text().splitlines()[0]
    content = json.loads(line)
    loss = 2 + np.random.default_rng(0).random(100_000)
    lines = [
        json.dumps(content | {"step": step, "total_tokens": step * 100, "loss": float(loss[step - 1]),
                              "peak_reserved_bytes": 23 * GIB if step == 54_321 else 10 * GIB})
        for step in range(1, 100_001)
    ]  # fmt: skip
    run.metrics.write_text("\n".join(lines) + "\n")
    event = asdict(RunEvent(time=1e9, step=1, kind=NASTY[:20], message=NASTY[:-1] * 20))
    run.events.write_text(
        "".join(json.dumps(event | {"step": step}) + "\n" for step in range(3000))
    )
    write_json(run.env, {"cards": [{"name": NASTY[:-1]}], "packages": {"torch": NASTY[:-1]}})
    start = time.process_time()
    text = page(compare([run.path]))
    seconds = time.process_time() - start
    path = directory / "hostile.html"
    path.write_text(text, encoding="utf-8")
    return path, seconds


def test_a_hostile_run_gives_a_small_page_in_time(hostile: tuple[Path, float]) -> None:
    path, seconds = hostile
    assert path.stat().st_size < MOST_BYTES
    assert (
        seconds < 20
    )  # of the processor, also where others use it too; work that grows with the square takes minutes


def test_nothing_in_the_data_becomes_markup(hostile: tuple[Path, float]) -> None:
    parser = Tags()
    parser.feed(hostile[0].read_text())
    assert "img" not in {tag for tag, _ in parser.tags}
    assert len(parser.scripts) == 4
    assert "run by data" in parser.scripts[0]  # as data
    assert "run by data" not in "".join(parser.scripts[2:])


def test_the_highest_peak_stays_in_the_picture_and_in_the_data(hostile: tuple[Path, float]) -> None:
    (run,) = read_report(hostile[0])
    assert run.train["peak_reserved_bytes"].max() == pytest.approx(23 * GIB)
    content = json.loads(
        re.search(r'id="fitune-figures">(.*?)</script>', hostile[0].read_text(), re.DOTALL)[1]
    )  # type: ignore[index]
    of_memory = [
        picture["data"]
        for picture in content["pictures"]
        if picture["layout"]["yaxis"]["title"]["text"] == "GiB"
    ]
    assert max(max(trace["y"]) for drawn in of_memory for trace in drawn) == 23


def test_a_page_in_chinese_says_so(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_LANG", "zh")
    text = page(compare([whole]))
    assert '<html lang="zh">' in text
    for words in ("是同一次训练", "比较", "显存峰值：预测与实测", "建议"):
        assert words in text


def test_the_report_command_writes_the_page_and_its_pictures(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "out.html"
    assert main(["report", str(whole), "-o", str(target), "--png", str(tmp_path / "png")]) == 0
    assert target.exists()
    drawn = sorted((tmp_path / "png").iterdir())
    assert len(drawn) == len(pictures(compare([whole])))
    assert all(
        file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in drawn
    )
    assert capsys.readouterr().out.splitlines()[0] == str(target)


@pytest.mark.parametrize("flag", ["-o", "--png"])
def test_a_place_that_cannot_be_written_is_answered_with_the_flag_that_named_it(
    flag: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    page = ["-o", str(tmp_path / "page.html")] if flag == "--png" else []
    assert main(["report", str(whole), *page, flag, str(tmp_path / "file" / "x.html")]) == 2
    assert capsys.readouterr().err.strip().endswith(f"; give another place with {flag}")


# In a browser.


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)


def browse(path: Path, work: Path, *options: str, anchor: str = "") -> str:
    """What Chromium writes for the page; fails on any console message or request to a network."""
    assert CHROMIUM is not None
    log = work / "net.json"
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         f"--user-data-dir={work / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         f"--log-net-log={log}", "--virtual-time-budget=20000", *options, f"{path.as_uri()}{anchor}"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    asked = re.findall(r'"url":"((?:https?|wss?):[^"]+)"', log.read_text(errors="replace"))
    assert not [url for url in asked if not re.match(ITS_MAKER, url)], asked
    return result.stdout


ITS_MAKER = r"https?://[\w.-]*(google|googleapis|gvt1|gstatic)\.com"
"""What Chromium asks on its own behalf."""


@needs_browser
@pytest.mark.parametrize(
    "body", ["<img src='http://example.invalid/x.png'>", "<script>missing()</script>"]
)
def test_the_check_sees_a_request_and_a_fault(tmp_path: Path, body: str) -> None:
    path = tmp_path / "bad.html"
    path.write_text(f"<!DOCTYPE html><title>bad</title>{body}")
    with pytest.raises(AssertionError):
        browse(path, tmp_path, "--dump-dom")


@needs_browser
def test_a_browser_draws_every_picture_without_a_fault_or_a_request(
    whole: Path, tmp_path: Path
) -> None:
    shown = browse(whole, tmp_path, "--dump-dom")
    num_pictures = len(pictures(compare([whole])))
    assert f'data-drawn="{num_pictures}"' in shown
    assert "data-fault" not in shown.partition(">")[0] + shown[:500]
    assert shown.count('<g class="subplot xy">') == num_pictures
    num_drawn = len(re.findall(r'<g class="(?:trace (?:scatter|bars)|trace bars)', shown))
    assert num_drawn >= sum(len(picture.series) for picture in pictures(compare([whole])))


@needs_browser
def test_the_axis_switches_to_tokens(whole: Path, tmp_path: Path) -> None:
    shown = browse(whole, tmp_path, "--dump-dom", anchor="#x=tokens")
    drawn = re.findall(
        r"<div class=\"plot[^>]*data-axis=\"tokens\"[^>]*>.*?</svg>.*?</svg>", shown, re.DOTALL
    )
    assert len(drawn) == 3  # loss, learning rate, gradient norm
    assert all(">tokens</text>" in each and ">step</text>" not in each for each in drawn)


@needs_browser
def test_the_hostile_page_runs_nothing_of_its_data(
    hostile: tuple[Path, float], tmp_path: Path
) -> None:
    shown = browse(hostile[0], tmp_path, "--dump-dom")
    assert "<title>run - fitune</title>" in shown
    assert "data-drawn" in shown


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_reader_wants(
    whole: Path, tmp_path: Path, scheme: str
) -> None:
    image_module = pytest.importorskip("PIL.Image")
    options = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(
        whole, tmp_path, "--window-size=900,1200", f"--screenshot={tmp_path / 'page.png'}", *options
    )
    with image_module.open(tmp_path / "page.png") as image:
        corner = image.convert("RGB").getpixel((5, 5))
    assert (sum(corner) < 200) == (scheme == "dark")


@needs_browser
def test_the_page_prints_on_a4(whole: Path, tmp_path: Path) -> None:
    browse(whole, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    width, height = map(
        float, re.search(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", content).groups()
    )  # type: ignore[union-attr]
    assert (width, height) == pytest.approx((595, 842), abs=1)
    assert os.path.getsize(tmp_path / "page.pdf") > 50_000


MEASURE = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => setTimeout(() => {
  const inside = frame.contentDocument, broken = [];
  for (const cell of inside.querySelectorAll("td bdi, th")) {
    const range = inside.createRange(), text = cell.textContent.trim();
    range.selectNodeContents(cell);
    const lines = new Set([...range.getClientRects()].map((each) => Math.round(each.top))).size;
    if (text.length <= 20 && !/\\s/.test(text) && lines > 1) broken.push(text);
  }
  const root = inside.documentElement;
  document.body.dataset.broken = JSON.stringify(broken);
  document.body.dataset.wider = root.scrollWidth - root.clientWidth;
}, 3000));
"""


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_name_is_broken_on_a_telephone(whole: Path, tmp_path: Path, width: int) -> None:
    framed = tmp_path / "framed.html"
    framed.write_text(
        f"<!DOCTYPE html><body><iframe style='width:{width}px;height:3000px' "
        f'srcdoc="{html.escape(whole.read_text())}"></iframe><script>{MEASURE}</script>'
    )
    shown = browse(framed, tmp_path, "--dump-dom", "--window-size=1500,3200")
    measured = re.search(r"<body data-broken=\"(.*?)\" data-wider=\"(-?\d+)\"", shown)
    assert measured is not None
    assert (html.unescape(measured[1]), measured[2]) == ("[]", "0")


@pytest.mark.parametrize(("kind", "label"), [("cpu", "memory of the machine"), ("cuda", "card")])
def test_the_memory_of_a_processor_is_not_called_a_card(
    tmp_path: Path, kind: str, label: str
) -> None:
    run = write_run(tmp_path, "run", Recipe())
    add_memory(run, minutes=1)
    add_plan(run)
    plan = json.loads(RunDirectory(run).plan.read_text())
    write_json(RunDirectory(run).plan, plan | {"device": {"total_bytes": 24 * GIB, "kind": kind}})
    (memory,) = [each for each in pictures(compare([run])) if each.key == "memory-run"]
    assert [name for name, _ in memory.lines] == [label, "memory limit"]


def test_learning_rate_and_gradient_norm_are_drawn(whole: Path) -> None:
    drawn = {each.key: each for each in pictures(compare([whole]))}
    assert {"lr", "grad_norm"} <= set(drawn)
    assert set(drawn["lr"].axes) == {"step", "tokens", "hours"}
    assert {float(each.y[0]) for each in drawn["lr"].series} == {3e-5, 6e-5}


def test_of_two_rates_the_first_sentence_says_which_won(tmp_path: Path) -> None:
    low = write_run(tmp_path, "low", Recipe(lr=1e-5, row_losses=[2.0] * 20))
    high = write_run(tmp_path, "high", Recipe(lr=3e-5, row_losses=[1.9] * 20))
    first, *_ = verdicts(compare([low, high]))
    assert first.startswith("best: high (learning rate 3e-05), with the lowest eval loss, 1.9000")
