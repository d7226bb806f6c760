"""What a person can type wrong: each ends with exit code 2 and one clear sentence a fault, and changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fitune.cli.app import main

GOOD = "model: {source: minimind2}\ndata: {train: a.jsonl}\n"
NEEDED = ("train", "--model", "minimind2", "--data", "a.jsonl")

# name: (the text of sft.yaml, the command line, what each line on stderr holds)
CONFIGS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", ("is empty",)),
    "comments only": ("# nothing\n", ("is empty",)),
    "a list": ("- a\n- b\n", ("holds a list of 2",)),
    "a word": ("hello", ("holds 'hello'",)),
    "binary": (b"\x80\x81\x00", ("is not a text file: byte 0",)),
    "control characters": (b"a: \x00", ("sft.yaml: not a text file: character 3",)),
    "too large": ("#" * 1_000_001, ("has over 1,000,000 bytes",)),
    "broken YAML": ("model: {source: m}\ndata: [a\n", ("sft.yaml:3: this is not valid YAML",)),
    "a tab": ("model:\n\tsource: m\n", ("sft.yaml:2: this is not valid YAML",)),
    "two documents": (f"{GOOD}---\n{GOOD}", ("sft.yaml:3: this is not valid YAML",)),
    "nested too deeply": ("[" * 5000, ("nested too deeply",)),
    "an anchor in itself": (
        f"{GOOD}optim: &a {{betas: *a}}\n",
        ("sft.yaml:3: this anchor contains itself", "betas"),
    ),
    "growing anchors": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
            for a, b in zip("abcdef", "bcdefg", strict=True)
        ),
        ("more than 10,000 values",),
    ),
    "a tag": (
        f"{GOOD}loss: !include x\n",
        ("sft.yaml:3: tags such as !include", "sft.yaml:3: loss is 'x'"),
    ),
    "a duplicate key": (
        f"{GOOD}loss: full\nloss: chunked\n",
        ("sft.yaml:4: 'loss' is given twice, first at",),
    ),
    "a misspelt key": (
        f"{GOOD}optim: {{warmpu: 0.1}}\n",
        ("sft.yaml:3: unknown key 'optim.warmpu': did you mean 'optim.warmup'?",),
    ),
    "a key in the wrong section": (
        f"{GOOD}train: {{lr: 1}}\n",
        ("unknown key 'train.lr': did you mean 'optim.lr'?",),
    ),
    "an unknown key": (
        f"{GOOD}xyzzy: 1\n",
        ("unknown key 'xyzzy': 'fitune config schema' lists the keys",),
    ),
    "a number as a key": (f"{GOOD}3: 1\n", ("unknown key '3'",)),
    "TRL's name": (f"{GOOD}per_device_train_batch_size: 4\n", ("'batch.micro'",)),
    "LLaMA-Factory's name": (
        f"{GOOD}cutoff_len: 4\n",
        ("LLaMA-Factory; here it is 'data.max_length'",),
    ),
    "axolotl's name": (f"{GOOD}micro_batch_size: 4\n", ("axolotl; here it is 'batch.micro'",)),
    "minimind's name": (
        f"{GOOD}accumulation_steps: 4\n",
        ("minimind; here it is 'batch.accumulation'",),
    ),
    "a name that needs nothing here": (f"{GOOD}do_train: true\n", ("drop it",)),
    "a value for a section": (
        f"{GOOD}optim: adamw\n",
        ("sft.yaml:3: 'optim' is a section of keys",),
    ),
    "a name for the model section": (
        "model: minimind2\ndata: {train: a}\n",
        ("sft.yaml:1: 'model' is a section of keys",),
    ),
    "text for a number": (
        f"{GOOD}optim: {{lr: high}}\n",
        (
            "sft.yaml:3: optim.lr is 'high': it must be a number of at least 1e-15 and of at most 1,000 or auto",
        ),
    ),
    "a quoted number": (
        f"{GOOD}optim: {{lr: '1e-4'}}\n",
        ("optim.lr is '1e-4': it must be a number",),
    ),
    "a fraction for a count": (
        f"{GOOD}train: {{steps: 1.5}}\n",
        ("train.steps is 1.5: it must be a whole number above 0",),
    ),
    "true for a count": (f"{GOOD}train: {{steps: true}}\n", ("train.steps is true",)),
    "a section given twice": (
        f"{GOOD}model: {{}}\n",
        ("sft.yaml:3: 'model' is given twice, first at sft.yaml:1",),
    ),
    "a number for true": (
        "model: {source: m}\ndata: {train: a, packing: 1}\n",
        ("data.packing is 1: it must be true",),
    ),
    "yes for true": (
        "model: {source: m}\ndata: {train: a, packing: yes}\n",
        ("data.packing is 'yes': it must be true or false",),
    ),
    "a list for a word": (
        "model: {source: [m]}\ndata: {train: a}\n",
        ("model.source is a list of 1",),
    ),
    "an unknown choice": (
        f"{GOOD}optim: {{schedule: cosin}}\n",
        ("it must be cosine, linear, constant or wsd; did you mean cosine?",),
    ),
    "a routing that is none": (
        f"{GOOD}memory: {{routing: wost}}\n",
        (
            "sft.yaml:3: memory.routing is 'wost': it must be balanced or worst; did you mean worst?",
        ),
    ),
    "below the limit": (
        f"{GOOD}train: {{steps: 0}}\n",
        ("train.steps is 0: it must be a whole number above 0",),
    ),
    "above the limit": (
        f"{GOOD}optim: {{warmup: 1.5}}\n",
        ("optim.warmup is 1.5: it must be a number of at least 0 and of at most 1",),
    ),
    "infinity": (f"{GOOD}optim: {{clip: .inf}}\n", ("optim.clip is inf",)),
    "not a number": (f"{GOOD}optim: {{lr: .nan}}\n", ("optim.lr is nan",)),
    "too few betas": (
        f"{GOOD}optim: {{betas: [0.9]}}\n",
        ("optim.betas is a list of 1: it must be a list of 2",),
    ),
    "a budget without a unit": (
        f"{GOOD}memory: {{budget: 24}}\n",
        ("memory.budget: 24 is neither a size like 20GiB",),
    ),
    "a budget of an unknown unit": (
        f"{GOOD}memory: {{budget: 20XB}}\n",
        ("memory.budget: '20XB' is not a size",),
    ),
    "no duration": (
        f"{GOOD}train: {{stop_after: soon}}\n",
        ("train.stop_after: 'soon' is not a duration",),
    ),
    "no data source": ("model: {source: m}\ndata: {train: []}\n", ("data.train is a list of 0",)),
    "a source without a path": (
        "model: {source: m}\ndata: {train: [{weight: 2}]}\n",
        ("data.train.0.path is missing",),
    ),
    "a bad weight": (
        "model: {source: m}\ndata:\n  train:\n  - {path: a, weight: -1}\n",
        ("sft.yaml:4: data.train.0.weight is -1",),
    ),
    "nothing given": ("model: {}\ndata:\n", ("model.source is missing", "data.train is missing")),
    "an empty path": (
        "model: {source: ''}\ndata: {train: a}\n",
        ("model.source is '': it must be text that is not empty",),
    ),
    "two lengths": (
        f"{GOOD}train: {{epochs: 1, steps: 9}}\n",
        ("sft.yaml:3: train.epochs and train.steps exclude each other",),
    ),
    "a product that is wrong": (
        f"{GOOD}batch: {{effective: 24, micro: 5, accumulation: 4}}\n",
        ("batch.micro 5 x batch.accumulation 4 = 20, but batch.effective is 24",),
    ),
    "a batch that cannot be cut": (
        f"{GOOD}batch: {{effective: 24, accumulation: 7}}\n",
        ("try batch.accumulation 6 or 8",),
    ),
    "a micro-batch above the batch": (
        f"{GOOD}batch: {{effective: 4, micro: 8}}\n",
        ("batch.micro 8 is more than batch.effective 4",),
    ),
    "rows and tokens": (f"{GOOD}batch: {{micro: 4, micro_tokens: 99}}\n", ("exclude each other",)),
    "LoRA keys without LoRA": (
        "model: {source: m, lora: {rank: 8}}\ndata: {train: a}\n",
        ("model.lora.rank has no effect",),
    ),
    "two ways to hold out": (
        "model: {source: m}\ndata: {train: a, eval: b, eval_fraction: 0.1}\n",
        ("drop one of them",),
    ),
    "evaluation of nothing": (
        f"{GOOD[:-2]}, eval_fraction: 0}}\ntrain: {{eval_every: 5}}\n",
        ("train.eval_every 5 has no effect",),
    ),
    "several faults": (
        f"{GOOD}optim: {{lr: -1, clip: -1}}\nlos: full\n",
        ("optim.lr is -1", "optim.clip is -1", "'loss'"),
    ),
}

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown verb": (("trian",), ('Unknown command "trian". Did you mean "train"?',)),
    "an unknown verb below a verb": (("config", "shema"), ("Did you mean",)),
    "an unknown flag": (
        (*NEEDED, "--sead", "1"),
        ("Unknown option: --sead. Did you mean --seed?",),
    ),
    "another tool's flag": ((*NEEDED, "--learning-rate", "1"), ("here it is 'optim.lr'",)),
    "a key as a flag": ((*NEEDED, "--optim.clip", "1"), ("optim.clip=VALUE",)),
    "a flag without a value": (("train", "--model"), ("--model requires an argument",)),
    "an unknown format": (("runs", "--format", "xml"), ("Choose from",)),
    "nothing to train": (("train",), ("give a configuration file, or --model and --data",)),
    "no data": (
        ("train", "--model", "m"),
        ("data.train is missing: give it in the configuration or with --data",),
    ),
    "a missing file": (("train", "nope.yaml"), ("nope.yaml does not exist",)),
    "a path below a file": (
        ("train", "file/sft.yaml"),
        ("file/sft.yaml cannot be read: Not a directory",),
    ),
    "a directory as a file": (("train", "."), (". is a directory, not a configuration file",)),
    "an override without a value": (
        (*NEEDED, "optim.lr=1", "optim.clip"),
        ("'optim.clip' is not an override",),
    ),
    "an override of a section": ((*NEEDED, "optim=1"), ("'optim' is a section of keys",)),
    "an override of nothing": ((*NEEDED, "=3"), ("'=3' is not an override",)),
    "an unknown key": ((*NEEDED, "data.cutoff_len=64"), ("here it is 'data.max_length'",)),
    "a key given twice": ((*NEEDED, "optim.lr=1", "--lr", "2"), ("'optim.lr' is given twice",)),
    "a broken list": (
        (*NEEDED[:3], "data.train=[a"),
        ("'[a' is not a value of YAML", "data.train is missing"),
    ),
    "a place that is not there": (
        ("train", "--model", "m", "data.train=a", "data.train.0.weight=2"),
        ("command line: 'data.train.0.weight' cannot be set: data.train is 'a', which has no '0'",),
    ),
    "a wrong value of a flag": ((*NEEDED, "--lr", "fast"), ("command line: optim.lr is 'fast'",)),
    "fewer than no rows": (
        ("check", "sft.yaml", "--show", "-1"),
        ('Invalid value "-1" for --show. Must be >= 0.',),
    ),
    "no devices": (
        ("config", "import", "file", "--devices", "0"),
        ('Invalid value "0" for --devices.',),
    ),
    "a directory for a page": (
        ("report", "nowhere", "-o", "pages/"),
        ("pages/ names a directory: give a file, such as -o pages/report.html",),
    ),
    "a directory for a configuration": (
        ("config", "import", "file", "-o", "."),
        (". names a directory: give a file, such as -o sft.yaml",),
    ),
    "runs in a file": (("runs", "file"), ("file is not a directory",)),
    "runs nowhere": (("runs", "nowhere"), ("nowhere is not a directory",)),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory but for one file; it must look the same afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    yield tmp_path
    assert (tmp_path / "file").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "sft.yaml"}


def check(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert output == ""
    assert [line for line in lines if not line.startswith("error: ")] == []
    assert len(lines) == len(expected), errors
    for line, part in zip(lines, expected, strict=True):
        assert part in line
        assert not any(word in line for word in ("pydantic", "Traceback", "yaml.", "<unicode"))


@pytest.mark.parametrize(("text", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_configuration(
    text: str | bytes, expected: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "sft.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    check(capsys, ("train", "sft.yaml"), expected)


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_line(
    arguments: tuple[str, ...], expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    check(capsys, arguments, expected)
