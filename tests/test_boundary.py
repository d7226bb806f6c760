"""What nobody foresaw becomes a sentence at the command line and at the public functions, and can be reported."""

from pathlib import Path

import pytest

import fitune
from fitune.boundary import parse_json, raised_as
from fitune.cli.app import main
from fitune.errors import DataError, FituneError, OutOfMemoryError, UnexpectedError


def failing(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError at test_boundary.py"),
        (KeyError("x"), 1, "KeyError"),
        (
            OSError(5, "Input/output error", "a.json"),
            1,
            "fitune runs cannot go on: a.json: Input/output error",
        ),
        (MemoryError(), 4, "fitune runs ran out of memory (MemoryError: no more is said)"),
    ],
    ids=str,
)
def test_the_command_line_says_what_it_does_not_know_in_a_line(
    error: Exception,
    exit_code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("FITUNE_DEBUG", raising=False)
    monkeypatch.setattr("fitune.cli.runs.list_runs", lambda _: failing(error))
    assert main(["runs", "."]) == exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_its_traceback_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FITUNE_DEBUG", "1")
    monkeypatch.setattr("fitune.cli.runs.list_runs", lambda _: failing(KeyError("x")))
    assert main(["runs", "."]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_public_function_raises_ours_and_keeps_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitune.report.compare._found", lambda _: failing(KeyError("x")))
    with pytest.raises(
        UnexpectedError, match=r"fitune\.compare met an error that it does not know: KeyError"
    ) as caught:
        fitune.compare(["a", "b"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fitune.report.compare._found", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitune.compare(["a"])


def test_a_parser_says_what_it_was_given() -> None:
    with (
        pytest.raises(DataError, match=r"a\.x cannot be read \(KeyError: 'x'\); mend it"),
        raised_as(DataError, "a.x cannot be read", "mend it"),
    ):
        failing(KeyError("x"))
    with pytest.raises(OutOfMemoryError), raised_as(DataError, "a", "b"):
        failing(OutOfMemoryError("ours"))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "1" + "0" * 400, '{"a": ', b"\xff"], ids=lambda _: ""
)
def test_json_that_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' and not a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ],
)
def test_torchruns_variables_are_checked(
    make: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fitune.distributed.processes import joined

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in make.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FituneError, match=said), joined():
        pass


def test_a_variable_of_torchrun_that_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from fitune.distributed.processes import joined

    monkeypatch.setenv("WORLD_SIZE", "")
    with joined() as ranks:
        assert ranks.size == 1


def test_a_name_that_is_no_name_is_refused(tmp_path: Path) -> None:
    from fitune.run.directory import check_place

    with pytest.raises(FituneError, match=r"run\.name '\\x00a' is not the name of a directory"):
        check_place(tmp_path, "\0a")
