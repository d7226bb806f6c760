"""Text that somebody else wrote reaches a terminal as text: no escape sequence, no turned direction, no markup."""

import json
import re
from pathlib import Path

import pytest
from rich.live import Live
from rich.text import Text

import fitune.cli.output as output
from fitune.cli.app import main
from fitune.language.printable import json_text, printable, printable_line
from fitune.run.directory import RunDirectory
from fitune.run.metrics import RunEvent, append_line
from tiny_models import save_tokenizer
from written_runs import Recipe, write_run

HOSTILE = "\x1b]0;title\x07\x1b[2Jred\x9b31m\u202egnp\x08[bold]b[/]\r"
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLES = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[\d*[AK]")


def check_screens(captured: "pytest.CaptureResult[str]") -> None:
    """Nothing raw on either stream, and what was hostile is still there to be read."""
    for text in captured:
        assert not _RAW.findall(_STYLES.sub("", text))
    assert "\\x1b]0;title" in "".join("".join(captured).split()).replace("\\\\", "\\").replace(
        "\\u001b", "\\x1b"
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a hostile name in a directory of runs, whose files are hostile too."""
    monkeypatch.chdir(tmp_path)
    name = HOSTILE.replace("/", "")
    made = RunDirectory(
        write_run(
            Path("runs"), "plain", Recipe(steps=4, evals=1, settings={"run": {"name": HOSTILE}})
        )
    )
    append_line(
        made.events, RunEvent(time=0.0, step=1, kind="alarm", message=f"warning: {HOSTILE}")
    )
    made.env.write_text(json.dumps({"cpu": {"name": HOSTILE}, "cards": []}))
    made.lock.write_text(json.dumps({"host": HOSTILE, "pid": HOSTILE}))
    return made.path.rename(made.path.with_name(name))


@pytest.mark.parametrize("output_format", ["human", "auto", "json", "quiet"])
@pytest.mark.parametrize(
    "verb",
    [["runs", "runs"], ["watch", "--once"], ["compare", "runs", "runs"], ["advise", "runs"]],
    ids=lambda v: v[0],
)
def test_the_screens_of_runs_send_nothing_raw(
    verb: list[str], output_format: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run) if word == "runs" and verb[0] != "runs" else word for word in verb]
    arguments = ["watch", str(run), "--once"] if verb[0] == "watch" else arguments
    main([*arguments, "--format", output_format])
    shown = capsys.readouterr()
    for text in shown:
        assert not _RAW.findall(_STYLES.sub("", text))
    if output_format in ("human", "auto") and verb[0] != "advise":
        assert "\\x1b]0;" in shown.out


@pytest.mark.parametrize("output_format", ["csv", "md"])
def test_nor_do_the_formats_of_a_comparison(
    output_format: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(run), "--format", output_format])
    check_screens(capsys.readouterr())


def test_the_lock_of_a_run_that_goes_on_sends_nothing_raw(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(run)]) == 2
    check_screens(capsys.readouterr())


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "FILE"],
        ["plan", "FILE"],
        ["check", "FILE"],
        ["train", f"optim.{HOSTILE}=1"],
        ["train", "--model", HOSTILE, "--data", HOSTILE],
        ["plan", "minimind2", "--gpu", HOSTILE],
        ["report", HOSTILE],
        ["export", HOSTILE, "--to", "hf"],
        ["config", "import", HOSTILE],
        ["sweep", HOSTILE],
        [HOSTILE],
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_an_error_sends_nothing_raw(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    escaped = json.dumps(HOSTILE)
    (tmp_path / "sft.yaml").write_text(
        f"model: {{source: {escaped}}}\ndata: {{train: {escaped}, {escaped}: 1}}\noptim: {{lr: {escaped}}}\n"
    )
    assert main([str(tmp_path / "sft.yaml") if word == "FILE" else word for word in arguments]) == 2
    check_screens(capsys.readouterr())


@pytest.mark.parametrize("show", ["0", "2"])
@pytest.mark.parametrize("output_format", ["human", "json"])
def test_data_shown_by_check_sends_nothing_raw(
    output_format: str, show: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        {"messages": [{"role": HOSTILE, "content": "w1"}]},
        {HOSTILE: 1},
    ]
    data = tmp_path / f"a{HOSTILE.replace('/', '')}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    main(["check", "--data", str(data), "--model", "minimind2", f"model.tokenizer={tmp_path / 'tokenizer'}",
          "--show", show, "data.eval_fraction=0", "--format", output_format])  # fmt: skip
    check_screens(capsys.readouterr())


def test_words_in_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    screen = output.Screen(force_terminal=True, width=60)
    screen.print("data [red]x[/red] [/] :smile:")
    screen.print(output.table(["[b]a", "b"], [["[link=http://x]y[/link]", "[/]"]]))
    shown = _STYLES.sub("", capsys.readouterr().out)
    assert "[red]x[/red] [/] :smile:" in shown
    assert "[link=http://x]y[/link]" in shown


def test_a_live_screen_sends_its_own_sequences_and_no_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = output.Screen(force_terminal=True, width=60)
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        live.update(Text(HOSTILE), refresh=True)
    shown = capsys.readouterr().out
    assert "\x1b[?1049h" in shown
    assert "\x1b]0;" not in shown
    assert "\\x1b]0;" in shown


def test_a_name_stays_in_one_line() -> None:
    assert printable_line("a\nerror: b\t") == "a\\nerror: b\\t"
    assert printable("a\nb\tc") == "a\nb\tc"


@pytest.mark.parametrize("text", ["中文，标点。", "émile", "👩‍👩‍👧", "हिन्दी", "a b\tc\n"])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "code", [*range(32), *range(127, 160), 0x202E, 0x2066, 0x2028, 0xD800, 0xFEFF]
)
def test_json_of_hostile_text_is_the_same_data(code: int) -> None:
    text = json_text({chr(code): [f"a{chr(code)}b"]})
    assert json.loads(text) == {chr(code): [f"a{chr(code)}b"]}
    assert printable(text) == text
