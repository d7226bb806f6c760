"""The help of every verb: two examples first, then its flags in groups, each with what its value is."""

import re
import shlex

import pytest

from fitune.cli.app import SCRIPT_VERB, _normalise, app, main
from fitune.cli.examples import EXAMPLES

VERBS = [verb for verb in EXAMPLES if verb]


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*verb.split(), "--help"]) == 0
    return capsys.readouterr().out


def test_every_verb_has_examples() -> None:
    assert {*VERBS, SCRIPT_VERB} == {name for name in app if not name.startswith("-")}


@pytest.mark.parametrize("verb", [*VERBS, ""])
def test_help_begins_with_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, one, two, *_ = help_of(verb, capsys).splitlines()
    assert first == "Examples:"
    assert (one.strip(), two.strip()) == EXAMPLES[verb]
    assert all(line.strip().startswith(f"fitune {verb}".strip()) for line in (one, two))


@pytest.mark.parametrize("command", [command for pair in EXAMPLES.values() for command in pair])
def test_an_example_is_a_command_that_is_understood(command: str) -> None:
    words = _normalise(shlex.split(command)[1:])
    app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        ("--lr", "FLOAT"),
        ("--batch", "SAMPLES"),
        ("--output", "PATH"),
        ("--max-length", "TOKENS"),
        ("--steps", "INT"),
    ],
)
def test_a_flag_says_what_its_value_is(
    flag: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(rf"{flag} {kind}\b", help_of("train", capsys))


def test_flags_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("plan", capsys)
    places = [
        text.index(f"─ {group} ─")
        for group in ("Configuration", "Memory", "Which settings", "Output")
    ]
    assert places == sorted(places)
    assert "STR" not in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_and_flags(shell: str) -> None:
    script = app.generate_completion(shell=shell)  # type: ignore[arg-type]
    assert all(verb in script for verb in VERBS)
    assert "max-length" in script
    assert "install-completion" in script
