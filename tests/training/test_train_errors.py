"""Data, models and places that cannot work: each ends with exit code 2 and one clear sentence a fault, before anything
is written."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, T5Config

from fitune.cli.app import main
from fitune.model.save import export_minimind
from tiny_models import TINY_GPT2, save_tokenizer
from tiny_run import save_tiny_model, write_config, write_dialogues

Make = Callable[[Path], object]
Case = tuple[
    Make, tuple[str, ...], tuple[str, ...]
]  # what is made, the overrides, what the errors hold

USER = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w2"}


def rows(*content: object) -> Make:
    return lambda place: (place / "sft.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in content)
    )


def text(content: str | bytes, name: str = "sft.jsonl") -> Make:
    return lambda place: (place / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def many(row: object, num_good: int = 3) -> Make:
    """One row that cannot be used among good ones: more than data.max_bad_fraction allows."""
    return rows(*[{"messages": [USER, ANSWER]}] * num_good, row)


def nothing(place: Path) -> None:
    pass


def directory_of_notes(place: Path) -> None:
    (place / "notes").mkdir()
    (place / "notes" / "a.txt").write_text("w1")


def without_template(place: Path) -> None:
    save_tokenizer(place / "bare")
    (place / "bare" / "chat_template.jinja").unlink()


DATA: dict[str, Case] = {
    "no file": (
        nothing,
        ("data.train=gone.jsonl",),
        ("no data at gone.jsonl: there is no such file",),
    ),
    "a weight without sense": (
        nothing,
        ("data.train=[{path: sft.jsonl, weight: 1e300}]",),
        (
            "data.train.0.weight is 1e+300: it must be a number of at least 1e-06 and of at most 10,000",
        ),
    ),
    "no directory": (nothing, ("data.train=gone/",), ("no data at gone/: there is no such file",)),
    "an empty file": (text(""), (), ("sft.jsonl is empty",)),
    "white space": (text("\n \n"), (), ("sft.jsonl is empty",)),
    "a binary file": (text(b"\x00\x01\x02" * 99), (), ("sft.jsonl is no text file",)),
    "another encoding": (text("é".encode("latin-1") * 3), (), ("not UTF-8 at byte 1",)),
    "broken lines": (text('{"messages": [\n' * 3), (), ("3 of 3 samples cannot be used",)),
    "a broken array": (
        text("[{}, "),
        (),
        ("broken JSON, Expecting value; an array cannot be read past that",),
    ),
    "no rows but numbers": (rows(1, 2), (), ("it is a number, not an object",)),
    "unknown keys": (rows({"a": 1}), (), ("its keys (a) fit no known format",)),
    "an unknown role": (
        many({"messages": [USER, {"role": "narrator", "content": "w"}]}),
        (),
        ("the role 'narrator'",),
    ),
    "an empty answer": (
        many({"messages": [USER, {"role": "assistant", "content": ""}]}),
        (),
        ("is empty",),
    ),
    "an answer that is a picture": (
        many(
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "image", "image": "a"}]},
                ]
            }
        ),
        (),
        ("only text can be trained on",),
    ),
    "no answer anywhere": (rows({"messages": [USER]}), (), ("it has no assistant message",)),
    "answers beyond max_length": (
        rows({"messages": [{"role": "user", "content": "w1 " * 20}, ANSWER]}),
        ("data.max_length=8",),
        ("would learn from nothing",),
    ),
    "rows that are all too long": (
        rows({"messages": [USER, ANSWER] * 9}),
        ("data.max_length=8", "data.too_long=drop"),
        ("would learn from nothing",),
    ),
    "weights that are all 0": (
        rows({"messages": [USER, ANSWER | {"loss_weight": 0}]}),
        (),
        ("would learn from nothing",),
    ),
    "mixed formats": (
        rows({"messages": [USER, ANSWER]}, {"text": "w1"}),
        (),
        ("mixes two formats: line 1",),
    ),
    "an unknown ending": (
        text("a", "sft.txt"),
        ("data.train=sft.txt",),
        ("unknown ending '.txt'",),
    ),
    "a directory without data": (
        directory_of_notes,
        ("data.train=notes",),
        ("the directory notes holds no data",),
    ),
    "no parquet": (
        text("a", "a.parquet"),
        ("data.train=a.parquet",),
        ("cannot be read as parquet",),
    ),
    "a sample of nothing": (nothing, ("data.train=sft.jsonl#0",), ("0 samples",)),
    "one source of two": (
        nothing,
        ("data.train=[sft.jsonl, gone.jsonl]",),
        ("no data at gone.jsonl",),
    ),
    "missing evaluation data": (
        nothing,
        ("data.eval=gone.jsonl", "data.eval_fraction=0.01"),
        ("no data at gone",),
    ),
    "no template": (
        without_template,
        ("model.tokenizer=bare",),
        ("the tokenizer has no chat template",),
    ),
    "a missing template file": (
        nothing,
        ("data.template=gone.jinja",),
        ("data.template gone.jinja cannot be read",),
    ),
    "a template that fails": (
        text("{{ nope() }}", "a.jinja"),
        ("data.template=a.jinja",),
        ("the chat template (a.jinja) cannot render",),
    ),
    "a template that is no template": (
        text("{% if %}", "a.jinja"),
        ("data.template=a.jinja",),
        ("the chat template (a.jinja) cannot render",),
    ),
    "a hub id without a connection": (
        nothing,
        ("data.train=someone/data",),
        ("it cannot be loaded from the hub",),
    ),
}


def corrupt(place: Path) -> None:
    copy_model(place)
    (place / "model" / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")


def truncated(place: Path) -> None:
    copy_model(place)
    file = place / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def copy_model(place: Path) -> None:
    shutil.copytree(place / "tiny", place / "model")


def without_config(place: Path) -> None:
    save_tokenizer(place / "model")


def without_weights(place: Path) -> None:
    copy_model(place)
    (place / "model" / "model.safetensors").unlink()


def without_tokenizer(place: Path) -> None:
    copy_model(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "model" / name).unlink()


def broken_tokenizer(place: Path) -> None:
    copy_model(place)
    (place / "model" / "tokenizer.json").write_text("{")


def broken_config(place: Path) -> None:
    copy_model(place)
    (place / "model" / "config.json").write_text("{")


def encoder(place: Path) -> None:
    BertConfig().save_pretrained(place / "model")
    save_tokenizer(place / "model")


def encoder_and_decoder(place: Path) -> None:
    T5Config().save_pretrained(place / "model")
    save_tokenizer(place / "model")


def unknown_architecture(place: Path) -> None:
    save_tokenizer(place / "model")
    (place / "model" / "config.json").write_text('{"model_type": "xyzzy"}')


def other_shape(place: Path) -> None:
    copy_model(place)
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))


def large_tokenizer(place: Path) -> None:
    save_tokenizer(place / "large", num_extra=99)


def gpt2(place: Path) -> None:
    save_tiny_model(place / "model", TINY_GPT2)


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("attacked",)


def pickled_code(place: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Attack()}, place / "a.pth")


def bare_pickle(place: Path) -> None:
    (place / "a.pth").write_bytes(pickle.dumps(Attack()))


def minimind_weights(place: Path) -> None:
    export_minimind(AutoModelForCausalLM.from_pretrained(place / "tiny"), place / "a.pth")


PTH = ("model.source=a.pth", "model.tokenizer=tiny")
HEADS = ("model.shape.num_heads=4",)
MODEL = ("model.source=model",)

MODELS: dict[str, Case] = {
    "no such path": (nothing, ("model.source=./gone",), ("model.source './gone' does not exist",)),
    "an unknown preset": (
        nothing,
        ("model.source=minimind9", "model.tokenizer=tiny"),
        ("did you mean minimind2",),
    ),
    "a hub id without a connection": (
        nothing,
        ("model.source=someone/model",),
        ("someone/model is not cached",),
    ),
    "a preset without a tokenizer": (
        nothing,
        ("model.source=minimind2",),
        ("minimind2 carries no tokenizer",),
    ),
    "a file of another kind": (
        text("a", "a.bin"),
        ("model.source=a.bin",),
        ("is a file of unknown kind",),
    ),
    "corrupt weights": (corrupt, MODEL, ("the weights of model are damaged",)),
    "truncated weights": (truncated, MODEL, ("the weights of model are damaged",)),
    "no config.json": (without_config, MODEL, ("model has no config.json",)),
    "a broken config.json": (broken_config, MODEL, ("model cannot be read",)),
    "no weights": (without_weights, MODEL, ("model holds no weights",)),
    "no tokenizer": (without_tokenizer, MODEL, ("model has no tokenizer.json",)),
    "a broken tokenizer": (broken_tokenizer, MODEL, ("model cannot be read",)),
    "an encoder": (encoder, MODEL, ("model is 'bert', an encoder",)),
    "an encoder with a decoder": (encoder_and_decoder, MODEL, ("model is 't5', an encoder",)),
    "an unknown architecture": (
        unknown_architecture,
        MODEL,
        ("model has an architecture that this transformers",),
    ),
    "weights of another shape": (
        other_shape,
        MODEL,
        ("the weights of model do not fit its architecture",),
    ),
    "a tokenizer beyond the vocabulary": (
        large_tokenizer,
        ("model.tokenizer=large",),
        ("an embedding of 64 rows",),
    ),
    "rows beyond the positions": (
        gpt2,
        (*MODEL, "data.max_length=65"),
        ("exceeds the 64 positions of model",),
    ),
    "no GGUF": (
        text("a", "a.gguf"),
        ("model.source=a.gguf", "model.tokenizer=tiny"),
        ("a.gguf is no GGUF file",),
    ),
    "a .pth that is text": (text("a", "a.pth"), PTH, ("a.pth cannot be read as a weights file",)),
    "a .pth with code": (pickled_code, PTH, ("a.pth is refused",)),
    "a pickle that is code": (bare_pickle, PTH, ("a.pth is refused",)),
    "an unknown preset of shape": (
        minimind_weights,
        (*PTH, "model.shape.preset=minimind7"),
        ("minimind7",),
    ),
    "a .pth that tells no number of heads": (minimind_weights, PTH, ("set model.shape.num_heads",)),
    "a wrong number of heads": (
        minimind_weights,
        (*PTH, "model.shape.num_heads=7"),
        ("7 heads do not divide",),
    ),
    "a wrong number of layers": (
        minimind_weights,
        (*PTH, *HEADS, "model.shape.num_layers=9"),
        ("says num_layers 9",),
    ),
    "a wrong width": (
        minimind_weights,
        (*PTH, *HEADS, "model.shape.hidden_size=99"),
        ("says hidden_size 99",),
    ),
    "the preset of another model": (
        minimind_weights,
        (*PTH, *HEADS, "model.shape.preset=minimind2"),
        ("preset minimind2 says",),
    ),
    "unknown targets": (
        nothing,
        ("model.method=lora", "model.lora.targets=[q_proj, nope]"),
        ("model.lora.targets names nope",),
    ),
    "an optimizer that is not installed": (
        nothing,
        ("optim.name=adamw_8bit",),
        ("needs bitsandbytes",),
    ),
    "an unknown allocator setting": (nothing, ("memory.allocator=nope:1",), ("nope",)),
}

PLACES: dict[str, Case] = {
    "below a file": (
        nothing,
        ("run.output=sft.jsonl/runs",),
        ("sft.jsonl is not a directory, and run.output needs one",),
    ),
    "a directory of another name, for the metrics": (
        nothing,
        ("run.prometheus=gone/now.prom",),
        ("gone does not exist, and run.prometheus is written there",),
    ),
    "metrics where no file can be": (
        nothing,
        ("run.prometheus=/proc/now.prom",),
        ("/proc is no place for files: its file system has 0 bytes; change run.prometheus",),
    ),
    "a name that is too long": (
        nothing,
        (f"run.name={'x' * 300}",),
        ("run.name has 300 bytes and may have 240: give a shorter one",),
    ),
    "a name that is a path": (
        nothing,
        ("run.name=a/b",),
        ("run.name 'a/b' is not the name of a directory",),
    ),
    "a name that is above": (
        nothing,
        ("run.name=..",),
        ("run.name '..' is not the name of a directory",),
    ),
    "somebody's directory": (
        directory_of_notes,
        ("run.output=.", "run.name=notes"),
        ("notes exists and is not a run",),
    ),
    "somebody's directory with --overwrite": (
        directory_of_notes,
        ("run.output=.", "run.name=notes", "--overwrite"),
        ("notes exists and is not a run",),
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tiny.parent / "cache"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    write_dialogues(tmp_path / "sft.jsonl")
    write_config(tmp_path / "sft.yaml", {"data": {"eval_fraction": 0.01}})
    return tmp_path


def files(place: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def check(place: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    make, overrides, expected = case
    make(place)
    before = files(place)
    capsys.readouterr()
    assert main(["train", "sft.yaml", "train.steps=2", *overrides]) == 2
    output, notes = capsys.readouterr()
    errors = [line for line in notes.splitlines() if line.startswith("error: ")]
    assert output == ""
    assert "Traceback" not in notes
    assert len(errors) == len(expected), notes
    assert all(part in notes for part in expected), notes
    assert files(place) == before


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_data_that_cannot_be_trained_on(
    case: Case, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(place, capsys, case)


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_used(
    case: Case, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(place, capsys, case)


@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES)
def test_a_place_that_cannot_hold_the_run(
    case: Case, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(place, capsys, case)


def test_a_pickle_with_code_is_never_run(place: Path) -> None:
    for make in (pickled_code, bare_pickle):
        make(place)
        assert main(["train", "sft.yaml", *PTH]) == 2
    assert not Path("attacked").exists()


def test_all_faults_of_a_configuration_are_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft.yaml", "optim.lr=-1", "train.steps=0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of 64 KiB, less than the weights need."""
    disk = place / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_in_one_sentence(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft.yaml", "train.steps=2", f"run.output={small_disk}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left" in errors[0] or "no space" in errors[0].lower()
    assert not list(small_disk.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("output", ["/proc/runs", "/proc/self/runs", "/sys/fs/a/b"])
def test_a_place_that_holds_no_files_is_refused_before_anything_is_loaded(
    output: str, dry: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft.yaml", f"run.output={output}", *dry]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "is no place for files: its file system has 0 bytes; change run.output" in errors[0]


@pytest.mark.parametrize("fault", ["mounted read-only", "of somebody else"])
def test_a_place_that_cannot_be_written_to_is_refused_by_a_dry_run(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "of somebody else":  # asked of the system, which lets root write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        real = os.statvfs

        def read_only(path: Path) -> object:
            found = real(path)
            return os.statvfs_result((*found[:8], found.f_flag | os.ST_RDONLY, *found[9:10]))

        monkeypatch.setattr(os, "statvfs", read_only)
    assert main(["train", "sft.yaml", "--dry-run"]) == 2
    assert (
        "error: . cannot be written to by this user: change run.output" in capsys.readouterr().err
    )


def test_a_dry_run_says_that_no_checkpoint_fits(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft.yaml", f"run.output={small_disk}", "--dry-run"]) == 2
    assert "no space" in capsys.readouterr().err.lower()


def test_a_long_name_of_model_and_data_is_cut(place: Path) -> None:
    long = place / ("数" * 80 + ".jsonl")
    (place / "sft.jsonl").rename(long)
    assert main(["train", "sft.yaml", f"data.train={long}", "run.name=null", "train.steps=1"]) == 0
    assert [len(path.name.encode()) < 255 for path in Path("runs").iterdir()] == [True]


def test_a_full_cache_says_how_to_name_another_place(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dialogues(Path("sft.jsonl"), 3000, seed=7)
    monkeypatch.setenv("FITUNE_CACHE", str(small_disk))
    assert main(["train", "sft.yaml"]) == 2
    assert "FITUNE_CACHE names another place" in capsys.readouterr().err
