"""Inputs that nobody would write on purpose, a function of a seed, for everything that fitune reads from others.

`PARSERS` has a reader for each kind of file or text, `try_input(name, seed, place)` gives it a damaged one. What is
read without complaint is as good as what is refused by a FituneError; anything else is a fault of the reader.
"""

import contextlib
import csv
import io
import json
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml

from byte_tokenizer import byte_tokenizer
from fitune.allocator.config import parse_allocator_config
from fitune.board.offline import offline_page as page
from fitune.config import ModelConfig, read_config
from fitune.config.importers.read import read_command, read_tool_file
from fitune.config.importers.translate import translate
from fitune.config.sections import DataConfig, DataSource
from fitune.data.examples import load_examples
from fitune.data.files import read_rows
from fitune.data.formats import RowError, normalise
from fitune.data.table import cached_table
from fitune.errors import FituneError
from fitune.machine.devices import find_device
from fitune.model.load import load_config, load_model, load_tokenizer
from fitune.report.compare import compare
from fitune.report.sources import read_recorded
from fitune.run.directory import RunDirectory, list_runs, open_run
from fitune.run.journal import CHAIN_START, StepRecord, append_step, read_journal
from fitune.run.memory import MemorySample, read_run_memory
from fitune.run.metrics import append_line
from fitune.run.sweep import read_states, read_sweep
from fitune.trace.snapshot import read_snapshot
from fitune.training.checkpoint.read import newest_checkpoint
from tiny_models import TINY_LLAMA, TINY_QWEN3
from tiny_run import dialogues, save_tiny_model
from written_runs import Recipe, write_run

META = torch.device("meta")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e300, 1e-300, 1e-46, -1e300, float("nan"),
    float("inf"), "", " ", "x", "\0a", "\x1b[31m", "\ud800", "é" * 50, "9" * 500, "1.2.3", "../..", "/dev/zero",
    "nan", [], [[]], {}, {"a": 1}, [None], [1, "a", {}], {"": None}, ["x"] * 50, "{{ messages }}", "null",
)  # fmt: skip
ODD_BYTES: tuple[bytes, ...] = (
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b]0;x\x07", b"\n", b"\r", b"{}", b"[]", b"null", b'"', b"}", b"]",
    b"9" * 5000, b"[" * 100_000, b"{\"a\":" * 2000, b"1e999", b"-", b"NaN", b"0.33330.250", b",", b":", b"&a [*a]",
    b"*a", b"!!python/object:os.system x", b"%", b"18446744073709551615", b"\\ud800", b"\t", b"'", b"#5", b"=",
    b"../../etc/passwd", b"1" + b"0" * 400,
)  # fmt: skip

Make = Callable[[Path], bytes]


@dataclass(frozen=True)
class Parser:
    """read: what reads the file at a path. seeds: whole inputs. name: of the file. share: of the budget; a reader that
    goes through another library takes a hundred times as long."""

    read: Callable[[Path], object]
    seeds: Callable[[], tuple[bytes, ...]]
    name: str
    share: float = 1.0
    place: Callable[[], Mapping[str, bytes]] = dict


def try_input(name: str, seed: int, place: Path) -> str | None:
    """The sentence of the FituneError that this input ends in, None where it is read. Raises what else it ends in."""
    parser = PARSERS[name]
    draw = random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for other, content in parser.place().items():
        (place / other).parent.mkdir(parents=True, exist_ok=True)
        (place / other).write_bytes(content)
    path = place / parser.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damaged(draw.choice(parser.seeds()), draw))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser.read(path)
        except FituneError as error:
            return str(error)
    return None


def damaged(content: bytes, draw: random.Random) -> bytes:
    if draw.randrange(3) == 0 and (changed := _odd_json(content, draw)) is not None:
        return changed
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(content) + 1)
        how = draw.randrange(6)
        if how == 0:
            content = content[:at]
        elif how == 1:
            content = content[:at] + content[at + draw.choice((1, 2, 8, 64)) :]
        elif how == 2:
            content = content[:at] + draw.choice(ODD_BYTES) + content[at:]
        elif how == 3 and at < len(content):
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        elif how == 4 and at < len(content):
            content = (
                content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
            )
        else:
            end = at + draw.choice((1, 4, 30))
            content = content[:end] + content[at:end] * draw.choice((1, 3)) + content[end:]
    return content


def _odd_json(content: bytes, draw: random.Random) -> bytes | None:
    """One value of a JSON text, or of one line of it, is another; None where it holds no JSON."""
    lines = content.split(b"\n") if content.count(b"\n") and content.startswith(b"{") else [content]
    number = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[number])
        holder = {"": tree}
        _replace(holder, draw)
        lines[number] = json.dumps(holder[""], allow_nan=True).encode()
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def _replace(tree: Any, draw: random.Random) -> None:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw.choice(keys)
    inside = tree[key]
    if isinstance(inside, dict | list) and inside and draw.randrange(5):
        _replace(inside, draw)
    elif isinstance(tree, dict) and key != "" and draw.randrange(4) == 0:
        del tree[key]
    elif isinstance(inside, dict) and draw.randrange(2):
        inside[draw.choice(("x", "loss", "weight", "role", ""))] = draw.choice(ODD_VALUES)
    else:
        tree[key] = draw.choice(ODD_VALUES)


# --- whole inputs ------------------------------------------------------------------------------------------------


@cache
def _rows() -> tuple[bytes, ...]:
    messages = [{"messages": each} for each in dialogues(3)]
    call = {"name": "f", "arguments": {"a": 1}}
    rows: list[Any] = [
        *messages,
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "system": "s",
        },
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
        {"prompt": "a", "completion": "b"},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        {"text": "a b c"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": call}],
                    "loss_weight": 0.5,
                },
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "b", "reasoning_content": "c", "weight": 1},
            ],
            "tools": json.dumps([{"type": "function", "function": call}]),
        },
    ]
    return (
        "\n".join(map(json.dumps, rows)).encode(),
        json.dumps(rows).encode(),
        json.dumps(rows, indent=1).encode(),
    )


@cache
def _messages() -> tuple[bytes, ...]:
    return ("\n".join(json.dumps({"messages": each}) for each in dialogues(3)).encode(),)


@cache
def _csv() -> tuple[bytes, ...]:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([["instruction", "input", "output"], ["a", "", "b"], ['c "d"', "e\nf", "g"]])
    return (
        file.getvalue().encode(),
        b"messages\n" + json.dumps(json.dumps(dialogues(1)[0])).encode(),
    )


@cache
def _parquet() -> tuple[bytes, ...]:
    found = []
    for columns in (
        {"messages": dialogues(3)},
        {"prompt": ["a", None], "completion": ["b", "c"], "loss_weight": [1.0, 2.0]},
        {"text": pyarrow.array([2**62], pyarrow.timestamp("us"))},
        {"text": [b"\xff", b"a"]},
    ):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        found.append(file.getvalue())
    return tuple(found)


@cache
def _configs() -> tuple[bytes, ...]:
    content: dict[str, Any] = {
        "model": {
            "source": "minimind2",
            "method": "lora",
            "lora": {"rank": 8, "targets": ["q_proj"]},
        },
        "data": {"train": [{"path": "a.jsonl", "weight": 2.0}], "max_length": 64},
        "batch": {"effective": 8, "micro": 2},
        "optim": {"lr": 1e-4, "betas": [0.9, 0.95], "warmup": 0.1},
        "memory": {"budget": "20GiB", "gpu": "RTX 4090", "allocator": "expandable_segments:True"},
        "train": {"epochs": 1, "stop_after": "1h30m"},
        "run": {"name": "a", "trackers": []},
    }
    return yaml.safe_dump(content).encode(), json.dumps(content).encode()


@cache
def _foreign_configs() -> tuple[bytes, ...]:
    factory = {
        "model_name_or_path": "org/model", "stage": "sft", "finetuning_type": "lora", "dataset": "alpaca_en",
        "template": "llama3", "cutoff_len": 2048, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4, "num_train_epochs": 3.0, "lora_target": "all", "bf16": True, "output_dir": "o",
    }  # fmt: skip
    axolotl = {
        "base_model": "org/model", "datasets": [{"path": "a.jsonl", "type": "alpaca"}], "adapter": "qlora",
        "sequence_len": 2048, "micro_batch_size": 2, "num_epochs": 1, "learning_rate": 2e-4, "lora_r": 8,
        "output_dir": "./o", "load_in_4bit": True, "optimizer": "adamw_bnb_8bit",
    }  # fmt: skip
    trl = {
        "model_name_or_path": "org/model",
        "dataset_name": "a",
        "max_length": 512,
        "learning_rate": 1e-5,
    }
    return tuple(yaml.safe_dump(each).encode() for each in (factory, axolotl, trl))


@cache
def _pth() -> tuple[bytes, ...]:
    from fitune.model.load import build_model

    found = []
    tensors = build_model(TINY_LLAMA, seed=1).state_dict()
    for content in (
        tensors,
        build_model(TINY_QWEN3, seed=1).state_dict(),
        {"model": tensors, "epoch": 1},
        dict(enumerate(tensors.values())),
        {name: tensor.flatten()[0] for name, tensor in tensors.items()},
        {name: tensor.flatten() for name, tensor in tensors.items()},
        {name: tensor[:0] for name, tensor in tensors.items()},
        {name.replace("layers.1", "layers.999999999"): tensor for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if "k_proj" not in name},
    ):
        for new in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=new)
            found.append(file.getvalue())
    return tuple(found)


@cache
def _directory() -> Mapping[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        save_tiny_model(Path(place), TINY_LLAMA)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


@cache
def _gguf() -> tuple[bytes, ...]:
    import tempfile

    from test_model_gguf import write_gguf

    with tempfile.TemporaryDirectory() as place:
        write_gguf(Path(place, "tiny.gguf"), TINY_LLAMA)
        return (Path(place, "tiny.gguf").read_bytes(),)


@cache
def _run() -> Mapping[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        path = write_run(Path(place), "run", Recipe(steps=4, evals=2, row_losses=(1.0, 2.0)))
        run = RunDirectory(path)
        record = StepRecord(
            step=1, position=4, ids_hash="0" * 16, loss_weight=3.0, plan=((1, 2), (3,)), lr=0.1, loss_sum=1.0,
            grad_norm=1.0, updated=True,
        )  # fmt: skip
        append_step(run.journal, CHAIN_START, record, seconds=1.0)
        append_line(run.memory, MemorySample(time=1e9, step=1, allocated_bytes=5))
        run.plan.write_text(
            json.dumps(
                {"chosen": 0, "candidates": [{"predicted_reserved_bytes": 1}], "settings": []}
            )
        )
        run.env.write_text(json.dumps({"torch": "2", "cards": [{"name": "x", "total_bytes": 1}]}))
        run.peak.write_text(json.dumps({"bytes": {"parameter": 1}}))
        run.data.write_text(json.dumps({"report": {}, "lengths": [1, 2]}))
        run.lock.write_text(json.dumps({"host": "h", "pid": 1}))
        step = run.checkpoints / "step-00000001"
        step.mkdir()
        (step / "manifest.json").write_text(json.dumps({"schema": 1, "files": {}}))
        (step / "state.json").write_text(
            json.dumps({"state": {}, "identity": {}, "conditions": {}, "log_bytes": {}})
        )
        files = [each for each in path.rglob("*") if each.is_file()]
        return {each.relative_to(path).as_posix(): each.read_bytes() for each in files}


@cache
def _report() -> tuple[bytes, ...]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        write_run(Path(place), "run", Recipe(steps=4, evals=2))
        return (page(compare(read_recorded(Path(place, "run")))).encode(),)


MINIMIND = (
    b"Epoch:[1/2](0/1000), loss: 2.7312, logits_loss: 2.7312, aux_loss: 0.0000, lr: 0.00005000, epoch_time: 31.0min\n"
    b"Epoch:[1/2](100/1000), loss: 0.33330.250, lr: 0.00004990, epoch_time: 30.0min\n"
    b"Epoch:[1/6](100/24681) loss:7.512 lr:0.000498751275 epoch_Time:40.0min:\n"
)


@cache
def _states() -> tuple[bytes, ...]:
    history = [
        {
            "loss": 2.5,
            "grad_norm": 1.0,
            "learning_rate": 1e-4,
            "epoch": 0.5,
            "step": 1,
            "num_tokens": 10,
        },
        {"eval_loss": 2.0, "eval_runtime": 1.0, "epoch": 1.0, "step": 2},
        {"train_runtime": 5.0, "total_flos": 1e9, "step": 2},
    ]
    return (
        json.dumps(
            {"log_history": history, "global_step": 2, "max_steps": 2, "train_batch_size": 4}
        ).encode(),
    )


@cache
def _logs() -> tuple[bytes, ...]:
    lines = [
        {
            "current_steps": 5,
            "total_steps": 10,
            "loss": 2.5,
            "lr": 5e-5,
            "elapsed_time": "0:00:12",
            "vram_reserved": 1,
        },
        {
            "current_steps": 10,
            "total_steps": 10,
            "eval_loss": 2.3,
            "elapsed_time": "1 day, 0:00:24",
        },
    ]
    swift = [
        {
            "loss": 2.5,
            "lr": 1e-4,
            "global_step/max_steps": "5/10",
            "elapsed_time": "1m 2s",
            "memory(GiB)": 10.5,
        }
    ]
    return tuple("\n".join(map(json.dumps, each)).encode() for each in (lines, swift))


@cache
def _snapshots() -> tuple[bytes, ...]:
    frames = [{"name": "step", "filename": "/torch/optim/adamw.py", "line": 1}]
    actions = [
        {"action": "alloc", "addr": 1, "size": 512, "stream": 0, "frames": frames},
        {"action": "free_completed", "addr": 2, "size": 512, "stream": 0},
        {"action": "free_requested", "addr": 1, "size": 512, "stream": 0, "frames": []},
    ]
    blocks = [{"size": 512, "state": "active_allocated", "requested_size": 500}]
    whole: dict[str, Any] = {
        "device_traces": [actions],
        "segments": [{"device": 0, "address": 1, "stream": 0, "blocks": blocks}],
    }
    odd: list[Any] = [
        whole,
        [],
        {"device_traces": 3, "segments": None},
        {"device_traces": {0: [1]}, "segments": [{}]},
    ]
    changes = (
        {"action": 1},
        {"size": "x"},
        {"addr": []},
        {"frames": 5},
        {"frames": [None]},
        {"stream": []},
    )
    odd += [{**whole, "device_traces": [[actions[0] | change, *actions]]} for change in changes]
    odd.append({**whole, "device_traces": [[{}]]})
    return tuple(pickle.dumps(each) for each in odd)


CARDS = tuple(
    name.encode()
    for name in (
        "RTX 4090",
        "H100 SXM",
        "A100 80GB",
        "cpu",
        "NVIDIA GeForce RTX 3090",
        "24GB",
        "T4 x2",
    )
)
ALLOCATORS = (
    b"expandable_segments:True,max_split_size_mb:128",
    b"roundup_power2_divisions:[256:1,512:2,>:4]",
)
OVERRIDES = (
    b"memory.budget=20GiB", b"memory.budget=0.9", b"train.stop_after=1h30m", b"data.train=a.jsonl#50",
    b"optim.betas=[0.9,0.95]", b"data.train=[{path: a, weight: 0.5}]", b"run.name=x", b"train.tokens=1e9",
    b"data.max_length=2048", b"model.lora={rank: 8}", b"batch.micro_tokens=4096",
)  # fmt: skip
STATES = b'{"schema": 1, "runs": [{"name": "a", "state": "does not fit", "plan": {}}]}'
COMMANDS = (
    b"python train_full_sft.py --epochs 2 --batch_size 16 --learning_rate 5e-7 --max_seq_len 340",
    b"llamafactory-cli train --model_name_or_path a --dataset b --stage sft --finetuning_type full",
    b"torchrun --nproc_per_node 2 train.py --model_name_or_path a --dataset_name b --bf16",
)


# --- what reads them ---------------------------------------------------------------------------------------------


def _read_rows(path: Path) -> None:
    for raw in read_rows(DataSource(path=str(path))):
        with contextlib.suppress(RowError):
            normalise(raw.value)


def _read_examples(path: Path) -> None:
    load_examples(DataConfig(train=str(path), max_length=64), byte_tokenizer())


def _read_run(path: Path) -> None:
    directory = next(parent for parent in path.parents if parent.name == "run")
    run = open_run(directory)
    list_runs(directory.parent)
    for read in (
        lambda: page(compare(read_recorded(directory))),
        lambda: newest_checkpoint(run),
        lambda: read_journal(run.journal),
        lambda: read_run_memory(run.memory),
        lambda: read_config(run.config),
    ):
        with contextlib.suppress(FituneError):
            read()


def _read_recorded(path: Path) -> None:
    compare(read_recorded(path))


def _read_sweep(path: Path) -> None:
    read_states(path.parent)
    read_recorded(path.parent)


def _read_pth(path: Path) -> None:
    load_config(ModelConfig(source=str(path)))


def _read_directory(path: Path) -> None:
    model = ModelConfig(source=str(path.parent), init="random")
    load_model(model, META)
    load_tokenizer(model)


def _read_weights(path: Path) -> None:
    load_model(ModelConfig(source=str(path.parent)), torch.device("cpu"))


def _read_facts(path: Path) -> None:
    def refuse(_: Any) -> Any:
        raise FituneError("made anew")

    cached_table({"key": 1}, refuse)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")


def _run_file(name: str) -> Parser:
    return Parser(_read_run, lambda: (_run()[name],), f"run/{name}", 0.2, lambda: _in_run(name))


def _in_run(name: str) -> Mapping[str, bytes]:
    return {f"run/{other}": content for other, content in _run().items() if other != name}


def _model_file(name: str, read: Callable[[Path], object], share: float) -> Parser:
    return Parser(
        read, lambda: (_directory()[name],), f"model/{name}", share, lambda: _in_model(name)
    )


def _in_model(name: str) -> Mapping[str, bytes]:
    return {f"model/{other}": content for other, content in _directory().items() if other != name}


RUN_FILES = (
    "config.yaml", "metrics.jsonl", "eval_rows.jsonl", "events.jsonl", "memory.jsonl", "journal.jsonl", "summary.json",
    "plan.json", "env.json", "peak.json", "data.json", "lock", "checkpoints/step-00000001/manifest.json",
    "checkpoints/step-00000001/state.json",
)  # fmt: skip
PARSERS: dict[str, Parser] = {
    "json lines": Parser(_read_rows, _rows, "rows.jsonl", 2),
    "json array": Parser(_read_rows, _rows, "rows.json", 2),
    "csv": Parser(_read_rows, _csv, "rows.csv"),
    "parquet": Parser(_read_rows, _parquet, "rows.parquet"),
    "examples": Parser(_read_examples, _messages, "rows.jsonl", 0.2),
    "configuration": Parser(read_config, _configs, "sft.yaml", 2),
    "override": Parser(lambda path: read_config({}, [_text(path)]), lambda: OVERRIDES, "override"),
    "other tool's configuration": Parser(
        lambda path: translate(read_tool_file(path)), _foreign_configs, "a.yaml"
    ),
    "other tool's command": Parser(
        lambda path: translate(read_command(_text(path).split() or ["x"])), lambda: COMMANDS, "a.sh"
    ),
    "sweep": Parser(
        read_sweep, lambda: (b"config: sft.yaml\ngrid: {optim.lr: [1e-4, 1e-5]}\n",), "sweep.yaml"
    ),
    "card": Parser(lambda path: find_device(_text(path)), lambda: CARDS, "card"),
    "allocator's configuration": Parser(
        lambda path: parse_allocator_config(_text(path)), lambda: ALLOCATORS, "conf"
    ),
    "pth": Parser(_read_pth, _pth, "w.pth", 0.5),
    "gguf": Parser(_read_pth, _gguf, "w.gguf", 0.2),
    "model's configuration": _model_file("config.json", _read_directory, 0.2),
    "tokenizer": _model_file("tokenizer.json", _read_directory, 0.1),
    "tokenizer's configuration": _model_file("tokenizer_config.json", _read_directory, 0.1),
    "weights": _model_file("model.safetensors", _read_weights, 0.05),
    "minimind's log": Parser(_read_recorded, lambda: (MINIMIND,), "train.log"),
    "transformers' log": Parser(_read_recorded, _states, "trainer_state.json"),
    "LLaMA-Factory's log": Parser(_read_recorded, _logs, "trainer_log.jsonl"),
    "report": Parser(_read_recorded, _report, "report.html", 0.2),
    "snapshot": Parser(read_snapshot, _snapshots, "snapshot.pickle", 2),
    "sweep's states": Parser(
        _read_sweep,
        lambda: (b'{"schema": 1, "runs": [{"name": "a", "state": "does not fit", "plan": {}}]}',),
        "sweep.json",
    ),
    "cached rows": Parser(
        _read_facts, lambda: (b'{"digest": "0", "facts": {}}',), "facts.json", 0.2
    ),
    **{f"run's {name}": _run_file(name) for name in RUN_FILES},
}
