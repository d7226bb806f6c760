"""Somebody else's training scripts are predicted as they are: to the byte, leaving nothing behind, refused in a sentence."""

import ast
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fitune.allocator.prediction import Prediction
from fitune.cli.app import main
from fitune.cli.plan_script import read_values
from fitune.errors import FituneError, UsageError
from fitune.planning import script as script_room
from fitune.planning.script import ScriptCommand, predict_script, read_script_command, vary_script
from tiny_run import save_tiny_model

SCRIPTS = Path(__file__).parents[1] / "scripts"
SOURCE = Path(__file__).parents[2] / "src" / "fitune"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the scripts and nothing of what they need."""
    shutil.copytree(SCRIPTS, tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "trainer"


def predict(place: Path, *words: str, **options: Any) -> Prediction:
    return predict_script(list(words), gpu="RTX 4090", cwd=place, **options)


def write(place: Path, code: str) -> str:
    (place / "own.py").write_text(code)
    return "own.py"


STEP = """
import torch
model = torch.nn.Linear(64, 64).to("cuda")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(9):
    model(torch.ones(8, 64, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


# Peaks of PyTorch's own allocator on the rehearsed RTX 4090: `python -m rehearsal.run python -m rehearsal.script -- ...`
# with the same arguments (torch 2.14.1), and with files of samples there.
@pytest.mark.parametrize(
    ("words", "allocated", "reserved", "assumed"),
    [
        (
            ["chat_trainer.py", "--dtype", "float16", "--use_wandb"],
            (35_766_784, 40_625_664),
            46_137_344,
            [
                "../out/pretrain.pth, which is not here",
                "../dataset/sft.jsonl",
                "wandb does nothing",
            ],
        ),
        (
            ["pretrainer.py", "--dropout=0.1", "--dtype=float16"],
            (33_905_152, 38_273_536),
            62_914_560,
            ["data/corpus/val.bin, which is not here", "recorded twice, others skipped"],
        ),
    ],
    ids=["chat", "pretrain"],
)
def test_a_script_needs_what_it_takes_on_the_rehearsed_card_and_leaves_nothing_behind(
    place: Path, words: list[str], allocated: tuple[int, int], reserved: int, assumed: list[str]
) -> None:
    before = sorted(place.parent.rglob("*"))
    found = predict(place, *words)
    assert tuple(step.allocated_bytes for step in found.step_peaks) == allocated
    assert found.peak_reserved_bytes == reserved
    assert found.fits
    told = "\n".join(found.assumptions)
    assert all(each in told for each in [*assumed, "what the script saves is not kept"]), told
    assert sorted(place.parent.rglob("*")) == before


def test_a_script_of_the_trainer_is_predicted_with_its_longest_samples(place: Path) -> None:
    save_tiny_model(place / "tiny")
    rows = [{"text": "some words of text " * (5 + i % 40)} for i in range(60)]
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["clm_trainer.py", "--model_name_or_path", "tiny", "--train_file", "text.jsonl"]
    words += ["--output_dir", "out", "--per_device_train_batch_size", "4", "--report_to", "none"]
    before = sorted(place.rglob("*"))
    found = predict(place, "torchrun", "--nproc_per_node=1", *words, "--bf16", "true")
    assert "every batch has the 4 longest samples" in "\n".join(found.assumptions)
    assert "tiny: built from its configuration, no weights are read" in found.assumptions
    assert found.categories["workspace"] > 0
    assert sorted(place.rglob("*")) == before


ONTO_CARD = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("medium", device_map="auto")
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(9):
    ids = torch.ones(2, 256, dtype=torch.long, device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_model_that_is_loaded_onto_the_card_reserves_what_it_does_on_the_rehearsed_one(
    place: Path,
) -> None:
    """transformers makes one segment for all weights. Rehearsed as above, with weights there."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=4096,
        tie_word_embeddings=True,
        dtype="float32",
    )
    config.save_pretrained(place / "medium")
    found = predict(place, write(place, ONTO_CARD))
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (846_199_808, 887_095_296)


PAGED = STEP.replace(
    "torch.optim.SGD(model.parameters(), 0.1)",
    "__import__('bitsandbytes').optim.PagedAdamW8bit(model.parameters())",
).replace("64", "1024")


def test_the_state_of_a_paged_optimizer_takes_nothing_of_the_card(place: Path) -> None:
    """Rehearsed as above."""
    pytest.importorskip("bitsandbytes")
    found = predict(place, write(place, PAGED))
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (25_541_632, 44_040_192)


def test_what_is_compiled_is_an_upper_bound(place: Path) -> None:
    words = ["chat_trainer.py", "--compile", "--width", "8192", "--layers", "8"]
    found = predict(place, *words, num_steps=1)
    assert found.fits is None
    assert any("torch.compile is not predicted" in each for each in found.assumptions)


def test_what_is_compiled_and_not_called_changes_nothing(place: Path) -> None:
    compiled = "import torch\n@torch.compile(dynamic=True)\ndef double(x):\n    return 2 * x\n"
    found = predict(place, write(place, compiled + STEP), num_steps=1)
    assert found.fits
    assert not any("torch.compile" in each for each in found.assumptions)
    called = STEP.replace("model(torch", "double(model(torch").replace(").sum", ")).sum")
    found = predict(place, write(place, compiled + called), num_steps=1)
    assert found.fits
    assert any("torch.compile" in each for each in found.assumptions)


def test_a_directory_that_a_script_makes_is_there_for_it(place: Path) -> None:
    code = (
        "import os\nos.makedirs('made/inside')\nassert os.statvfs('made/inside').f_namemax\n"
        "import datasets\nrows = datasets.Dataset.from_list([{'a': 1}])\n"
        "rows.save_to_disk('made/rows')\nassert len(datasets.load_from_disk('made/rows'))\n"
        "os.chdir('made/inside')\nopen('x', 'w').write('1')\nassert open('x').read() == '1'\n"
    )
    assert predict(place, write(place, code + STEP)).fits
    assert not (place / "made").exists()


def test_a_notebook_is_predicted_by_its_cells(place: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# training"]},
        {"cell_type": "code", "source": ["!pip install torch\n", "%matplotlib inline\n"]},
        {"cell_type": "code", "source": STEP},
    ]
    (place / "train.ipynb").write_text(json.dumps({"cells": cells}))
    found = predict_script("train.ipynb", gpu="RTX 4090", cwd=place, num_steps=3)
    assert [step.step for step in found.step_peaks] == [1, 2, 3]


def test_a_script_that_updates_its_parameters_by_hand_is_predicted(place: Path) -> None:
    by_hand = "for p in model.parameters():\n        p.data.add_(p.grad, alpha=-1)"
    code = STEP.replace("optimizer.step()", by_hand).replace("optimizer.zero", "model.zero")
    found = predict(place, write(place, code), num_steps=3)
    assert [step.step for step in found.step_peaks] == [1, 2, 3]
    assert any("updates its parameters where it clears" in line for line in found.assumptions)


REFUSED = {
    "no step": (
        STEP.replace("optimizer.step()", "pass").replace("optimizer.zero_grad()", "pass"),
        r"own.py ended after 9 forward passes without an optimizer.step\(\)",
    ),
    "fails": (
        "import torch\nraise ValueError('wrong')",
        r"stopped at own.py:2 .*ValueError: wrong",
    ),
    "ends": (
        "import argparse\nargparse.ArgumentParser(prog='own').parse_args(['--nope'])",
        r"called sys.exit\(2\) before its first optimizer step. It printed: .*arguments: --nope",
    ),
    "file": ("open('absent.txt')", r"needs absent.txt at own.py:1, which is not here: give --cwd"),
    **{
        f"model {name}": (
            f"import transformers\ntransformers.AutoModelForCausalLM.from_pretrained('{name}')",
            f"needs {said} at own.py:2.*, which is not here: get its configuration and tokenizer",
        )
        for name, said in {
            "../../absent": r"\.\./\.\./absent",
            "nobody/nothing": "a model of the hub",
        }.items()
    },
    "kernels": ("import unsloth", r"uses Unsloth's kernels, whose memory is not known"),
    "processes": (
        "import torch.distributed as d\nd.init_process_group('gloo')",
        "trains in several processes, and a prediction is of one",
    ),
    "network": (
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "a script that is predicted has no network",
    ),
    "samples": (
        "from datasets import load_dataset\n"
        "load_dataset('json', data_files='a.jsonl', split='train')[0]['gt']",
        r"a.jsonl is not here, and the script asks its samples for 'gt', .*put a file",
    ),
    "processor": (
        STEP.replace("'cuda'", "'cpu'").replace('"cuda"', '"cpu"'),
        "trains on the processor: none of its parameters is on the card",
    ),
    "workers": (
        "import multiprocessing as m\nw = m.get_context('spawn').Process(target=print)\n"
        "w.start()\nw.join()",
        "ended after 0 forward passes .*; it started 1 processes by multiprocessing",
    ),
    "library": (
        "import json, numpy\nnumpy.ones(2).reshape(3)\nnumpy.linalg.inv(numpy.ones(2))",
        "stopped at own.py:2 before",
    ),
    "quantised": (
        "from transformers import LlamaForCausalLM\n"
        "LlamaForCausalLM.from_pretrained('x', load_in_4bit=True)",
        "loads a quantised model, .*model.method=qlora",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_predicted_is_said_in_one_sentence(case: str, place: Path) -> None:
    code, said = REFUSED[case]
    with pytest.raises(FituneError, match=said) as refused:
        predict(place, write(place, code))
    assert "\n" not in str(refused.value)


LAUNCHER = """
import os, subprocess, sys, torch
FOUND_AT_IMPORT = torch.cuda.is_available()
def main():
    subprocess.run(["git", "--version"], check=False)
    assert FOUND_AT_IMPORT
    subprocess.run(WORDS, env=os.environ | {"WIDTH": "128"}, check=True)
"""
WIDTH = STEP.replace("import torch", "import os, torch\nW = int(os.environ['WIDTH'])").replace(
    "64", "W"
)


def install_command(place: Path, words: list[str]) -> str:
    """Install a package with a command `tune` beside a Python, as pip does."""
    library = place / "env" / "lib" / "site-packages"
    (library / "tuner").mkdir(parents=True)
    (library / "tuner" / "__init__.py").touch()
    (library / "tuner" / "cli.py").write_text(LAUNCHER.replace("WORDS", repr(words)))
    (place / "env" / "bin").mkdir()
    python = place / "env" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={library} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = place / "env" / "bin" / "tune"
    command.write_text(f"#!{python}\nfrom tuner.cli import main\nmain()\n")
    command.chmod(0o755)
    return str(python)


def test_what_the_command_of_a_trainer_starts_is_predicted_in_its_place(place: Path) -> None:
    script = str(place / write(place, WIDTH))
    launch = ["accelerate", "launch", "--mixed_precision", "bf16", script]
    python = install_command(place, launch)
    found = predict(place, "tune", python=python)
    assert found.categories["parameter"] == (128 * 128 + 128) * 4


BEFORE = """
import os, subprocess, sys
for start in (lambda words: subprocess.check_output(words, cwd="data", text=True), WITH_SHELL):
    assert start([sys.executable, "prepare.py"]).count("prepared") == 1
assert open("data/width.txt").read() == "64"
"""


def test_a_script_that_prepares_its_data_in_a_process_of_its_own_trains_after_it(
    place: Path,
) -> None:
    """What such a process writes is found by the script, and stays no longer than it does."""
    (place / "data").mkdir()
    (place / "data" / "prepare.py").write_text(
        "open('width.txt', 'w').write('64')\nprint('prepared')\n"
    )
    with_shell = "lambda words: 'prepared' * (os.system(f'X=1 {words[0]} data/prepare.py') == 0)"
    found = predict(place, write(place, BEFORE.replace("WITH_SHELL", with_shell) + STEP))
    assert found.categories["parameter"] == 64 * 64 * 4 + 512  # blocks of 512 bytes
    assert [path.name for path in (place / "data").iterdir()] == ["prepare.py"]


def test_a_process_that_a_script_starts_and_that_fails_is_named(place: Path) -> None:
    (place / "prepare.py").write_text("open('absent.txt')")
    code = "import subprocess, sys\nsubprocess.run([sys.executable, 'prepare.py'])\n"
    with pytest.raises(UsageError, match=r"needs absent.txt at prepare.py:1"):
        predict(place, write(place, code + STEP))
    (place / "prepare.py").write_text("")
    code = "import os, sys\nos.execv(sys.executable, [sys.executable, 'prepare.py'])\n"
    with pytest.raises(UsageError, match=r"prepare.py ended after 0 forward passes"):
        predict(place, write(place, code + STEP))


def test_a_command_that_starts_several_processes_is_refused(place: Path) -> None:
    python = install_command(place, ["torchrun", "--nproc_per_node", "2", "own.py"])
    with pytest.raises(UsageError, match="starts 2 processes"):
        predict(place, "tune", python=python)


def test_accelerate_hands_its_settings_to_the_script(place: Path) -> None:
    (place / "one.yaml").write_text("mixed_precision: fp16\nnum_processes: 1\n")
    words = f"accelerate launch --debug --config_file {place / 'one.yaml'} t.py -x".split()
    found = read_script_command(words)
    assert (found.name, found.arguments) == ("t.py", ("-x",))
    assert found.variables == (("ACCELERATE_MIXED_PRECISION", "fp16"),)
    (place / "eight.yaml").write_text("distributed_type: FSDP\nnum_processes: 8\n")
    with pytest.raises(UsageError, match="starts 8 processes"):
        read_script_command(["accelerate", "launch", "--config_file", str(place / "eight.yaml")])
    with pytest.raises(UsageError, match="use_fsdp shares the model among processes"):
        read_script_command(["accelerate", "launch", "--use_fsdp", "t.py"])
    with pytest.raises(UsageError, match=r"absent.yaml, the configuration .* cannot be read"):
        read_script_command(["accelerate", "launch", "--config_file", "absent.yaml", "t.py"])


def test_a_script_that_catches_everything_is_ended(place: Path) -> None:
    """It goes on after the end of its last step, and what was recorded until then counts."""
    forward = "    model(torch.ones(8, 64, device='cuda')).sum().backward()"
    code = STEP.replace("range(9)", "iter(int, 1)").replace(
        forward, f"    try:\n    {forward}\n    except BaseException:\n        pass"
    )
    assert len(predict(place, write(place, code)).step_peaks) == 2


REFERENCE = """
import torch
model = torch.nn.Linear(64, 64).to("cuda")
reference = torch.nn.Sequential(torch.nn.Linear(64, 2**18), torch.nn.Linear(2**18, 64)).to("cuda")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(9):
    x = torch.ones(64, 64, device="cuda")
    y = model(x)
    with torch.no_grad():
        wanted = reference(x)
    (y - wanted).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_the_passes_of_a_reference_model_count_in_every_step(place: Path) -> None:
    """An evaluation is cut short, but what a step of training computes beside its model is not."""
    found = predict(place, write(place, REFERENCE), num_steps=4)
    hidden_bytes = 64 * 2**18 * 4
    held = found.step_peaks[-1].allocated_bytes - 2 * 64 * 2**18 * 4
    assert held > hidden_bytes
    assert found.step_peaks[1] == replace(found.step_peaks[3], step=2)


LIBRARY = """
import pickle, torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter, _SingleProcessDataLoaderIter


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1024, 1024)

    def forward(self, x):
        # an attribute of the constructor's device, as tables of angles are made
        return self.linear(x) * torch.tensor([t for t in torch.ones(2)])[0]


class Loader(DataLoader):  # litdata's has iterators of its own
    def _get_iterator(self):
        kind = _MultiProcessingDataLoaderIter if self.num_workers else _SingleProcessDataLoaderIter
        return kind(self)


def prepare(path):
    # a worker computes on real tensors, and its file is found again
    torch.save(torch.nn.Linear(1024, 1024).state_dict(), path)


if __name__ == "__main__":
    context = torch.multiprocessing.get_context("spawn")
    worker = context.Process(target=prepare, args=("prepared.pt",))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    with open("own.pkl", "rb") as file:
        weights = pickle.load(file)
    with torch.device("meta"):
        estimate = Model()
        estimate(torch.ones(4, 1024)).sum().backward()
        model = Model()
    model.to_empty(device="cuda")
    model.load_state_dict(state_dict=weights)
    model.load_state_dict(state_dict=torch.load("absent.pt"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in Loader(torch.ones(64, 1024), batch_size=4, num_workers=2):
        model(x.to("cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


def test_what_libraries_do_beside_the_training_takes_nothing_of_the_card(place: Path) -> None:
    """Meta models, checkpoints that are unpickled, workers and loaders with iterators of their own."""
    state = {
        "linear." + name: each for name, each in torch.nn.Linear(1024, 1024).state_dict().items()
    }
    (place / "own.pkl").write_bytes(pickle.dumps(state))
    found = predict(place, write(place, LIBRARY))
    parameters = 4 * (1024 * 1024 + 1024)
    assert found.categories["parameter"] == parameters
    assert (
        2 * parameters
        < found.peak_allocated_bytes - found.categories["workspace"]
        < 2.1 * parameters
    )
    assert not (place / "prepared.pt").exists()


def test_the_allocator_is_set_as_the_script_sets_it(place: Path) -> None:
    setting = "import os\nos.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'expandable_segments:True'\n"
    step = STEP.replace("64, 64)", "64, 2**16)").replace("ones(8, 64", "ones(2**10, 64")
    usual = predict(place, write(place, step))
    expandable = predict(place, write(place, setting + step))
    assert expandable.peak_allocated_bytes == usual.peak_allocated_bytes
    assert expandable.peak_reserved_bytes != usual.peak_reserved_bytes
    assert "allocator settings: expandable_segments:True" in expandable.assumptions


def test_an_interpreter_without_torch_is_named(place: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    with pytest.raises(UsageError, match=r"cannot import (torch|numpy): activate the environment"):
        predict(place, "chat_trainer.py", python=str(bare / "bin" / "python"))


COMMANDS = {
    "train.py --a 1": ScriptCommand(None, "train.py", False, ("--a", "1")),
    "python -u train.py": ScriptCommand("python", "train.py", False, ()),
    "python3.11 -m pkg.train x": ScriptCommand("python3.11", "pkg.train", True, ("x",)),
    "CUDA_VISIBLE_DEVICES=1 python t.py": ScriptCommand(
        "python", "t.py", False, (), (("CUDA_VISIBLE_DEVICES", "1"),)
    ),
    "torchrun --standalone --nproc_per_node 1 t.py -x": ScriptCommand(None, "t.py", False, ("-x",)),
    "accelerate launch --mixed_precision bf16 t.py": ScriptCommand(
        None, "t.py", False, (), (("ACCELERATE_MIXED_PRECISION", "bf16"),)
    ),
    "python -m torch.distributed.run --nproc-per-node=1 t.py": ScriptCommand(
        "python", "t.py", False, ()
    ),
    "uv run python t.py": ScriptCommand("python", "t.py", False, ()),
}


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_is_read_as_it_is_typed(text: str) -> None:
    found = read_script_command(text.split())
    # the Python of a launcher that is installed here
    assert replace(found, python=COMMANDS[text].python) == COMMANDS[text]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("torchrun --nproc_per_node=4 t.py", r"starts 4 processes \(--nproc_per_node\)"),
        ("accelerate launch --num_processes 2 t.py", "starts 2 processes"),
        ("deepspeed t.py", "deepspeed starts several processes"),
        ("accelerate config", "accelerate config trains nothing"),
        ("python -c pass", "python -c has no script"),
        ("python", "no script behind --"),
        ("python absent.py", "there is no script absent.py in .*: give --cwd"),
    ],
)
def test_a_command_that_cannot_be_predicted_is_refused(text: str, said: str, place: Path) -> None:
    with pytest.raises(UsageError, match=said):
        predict(place, *text.split())


def test_an_argument_is_replaced_however_it_is_written() -> None:
    for given in (["--batch_size", "4"], ["--batch-size", "4"], ["--batch_size=4"]):
        command = ScriptCommand(None, "t.py", False, (*given, "--other", "4"))
        changed = command.with_argument("batch_size", "8").arguments
        assert changed == (*(word.replace("4", "8") for word in given), "--other", "4")
    assert ScriptCommand(None, "t.py", False, ()).with_argument("n", "2").arguments == ("--n", "2")


def test_the_largest_value_that_fits_is_found_by_bisection() -> None:
    asked: list[int] = []

    def predict_value(value: int) -> Any:
        asked.append(value)
        return type("P", (), {"fits": value <= 37})()

    found = vary_script(predict_value, [1, 64], search=True)
    assert max(each.value for each in found if each.prediction.fits) == 37
    assert [each.value for each in found] == sorted(asked)
    assert len(asked) <= 8


@pytest.mark.parametrize("text", ["batch_size", "batch_size=", "=4", "n=4..2", "n=0,1", "n=a"])
def test_values_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no values: write it like batch_size=4,6,8"):
        read_values(text)


def test_the_command_shows_each_value_and_marks_the_largest(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(script_room, "record_command", _recorded_once(script_room.record_command))
    words = ["plan", "--gpu", "RTX 4090", "--vary", "batch_size=2,4"]
    assert main([*words, "--", "chat_trainer.py", "--batch_size", "1"]) == 0
    shown = capsys.readouterr().out
    assert "→ 4" in shown
    assert "largest batch_size that fits: 4" in shown
    monkeypatch.setenv("FITUNE_LANG", "zh")
    assert main([*words, "--format", "quiet", "--", "chat_trainer.py"]) == 0
    assert capsys.readouterr().out == "4\n"
    assert main(["plan", "--gpu", "RTX 4090", "--", "chat_trainer.py"]) == 0
    assert "放得下" in capsys.readouterr().out


def _recorded_once(record: Any) -> Any:
    """Recording, which takes seconds, is done once: what is shown of it is tested here."""
    known: list[Any] = []

    def record_once(*arguments: Any, **options: Any) -> Any:
        if not known:
            known.append(record(*arguments, **options))
        return known[0]

    return record_once


def test_what_does_not_fit_ends_with_exit_code_3(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--gpu", "RTX 4090", "--cwd", str(place), "--steps", "1"]
    assert main([*words, "--", "chat_trainer.py", "--width", "8192", "--layers", "8"]) == 3
    assert "does not fit: it needs" in capsys.readouterr().err


ALONE = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"rich", "pydantic", "transformers", "datasets", "psutil", "yaml", "safetensors"}:
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Only())
"""


def test_the_recorder_needs_torch_and_numpy_alone(place: Path) -> None:
    (place / "sitecustomize.py").write_text(ALONE)
    script = write(place, STEP)
    wrapper = place / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    assert predict(place, script, python=str(wrapper)).peak_allocated_bytes > 0


def test_the_recorder_is_written_for_python_3_10() -> None:
    """A script's own environment may have an older Python than fitune's."""
    rooms = ["recorder", "language"]
    files = [
        SOURCE / "__init__.py",
        *(SOURCE / f"{name}.py" for name in ("boundary", "display", "errors", "importing")),
        *(path for each in rooms for path in (SOURCE / each).glob("*.py")),
    ]
    newer = {"Self", "assert_never", "StrEnum", "ExceptionGroup", "tomllib", "LiteralString"}
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
        names = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (*(alias.name for alias in node.names), getattr(node, "module", ""))
        }
        assert not names & newer, path
