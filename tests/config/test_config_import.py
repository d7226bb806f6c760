"""The configurations of other trainers become ours with the same meaning, and what could not be kept is said."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.cli.app import main
from fitune.config import RunConfig, read_config
from fitune.config.importers.names import KEYS_OF_OTHER_TOOLS
from fitune.config.importers.read import ToolArguments, read_command, read_tool_file
from fitune.config.importers.reasons import NOT_NEEDED, OTHER_TRAINING
from fitune.config.importers.tools import TOOLS
from fitune.config.importers.translate import ImportedConfig, translate
from fitune.errors import ConfigError

LLAMA_FACTORY = """\
### model
model_name_or_path: org/model-8b
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
### dataset
dataset: identity,more
dataset_dir: data
template: llama3
cutoff_len: 1536
max_samples: 1000
preprocessing_num_workers: 16
val_size: 0.1
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.5
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
flash_attn: fa2
neftune_noise_alpha: 5
### output
output_dir: saves/llama3-8b/lora/sft
eval_strategy: steps
eval_steps: 250
save_steps: 500
"""
AXOLOTL = """\
base_model: org/model-1b
load_in_4bit: true
datasets:
  - path: data/one.jsonl
    type: chat_template
  - path: json
    data_files: data/two.jsonl
    split: train
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
weight_decay: 0.0
warmup_steps: 10
train_on_inputs: false
bf16: auto
gradient_checkpointing: true
flash_attention: true
wandb_project:
special_tokens:
  pad_token: "<|end_of_text|>"
"""
TRL = """\
model_name_or_path: org/model-0.5b
dataset_name: data/capybara.jsonl
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
max_length: 2048
packing: false
assistant_only_loss: true
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
lr_scheduler_type: constant_with_warmup
max_steps: 400
warmup_steps: 20
report_to: [tensorboard, comet_ml]
output_dir: out/trl
"""
MINIMIND = """\
#!/bin/sh
DATA=../dataset/sft_512.jsonl
torchrun --nproc_per_node 2 train_full_sft.py --batch_size 16 --accumulation_steps 8 \\
    --learning_rate 1e-5 --max_seq_len 512 --data_path $DATA --save_interval=1000 --grad_clip 0.5
"""
LF = "llamafactory-cli train --model_name_or_path m --dataset d.json "
HF = "trl sft --model_name_or_path m --dataset_name d "


def imported(tmp_path: Path, text: str, name: str = "other.yaml", **options: Any) -> ImportedConfig:
    (tmp_path / name).write_text(text)
    return translate(read_tool_file(tmp_path / name), **options)


def config(tmp_path: Path, text: str, name: str = "other.yaml", **options: Any) -> RunConfig:
    return imported(tmp_path, text, name, **options).resolved.config


def command(text: str) -> ImportedConfig:
    return translate(read_command(text.split()))


def test_llama_factory_keeps_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    entries = {"identity": {"file_name": "identity.json"}, "more": {"hf_hub_url": "org/more"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    found = config(tmp_path, LLAMA_FACTORY)
    assert found.model.source == "org/model-8b"
    assert (found.model.method, found.model.precision, found.model.trust_remote_code) == (
        "lora",
        "bfloat16",
        True,
    )
    lora = found.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (8, 16, 0.0, ("q_proj", "v_proj"))
    assert [(source.path, source.max_rows) for source in found.data.train_sources] == [
        ("data/identity.json", 1000),
        ("org/more", 1000),
    ]
    assert (found.data.max_length, found.data.eval_fraction, found.data.mask) == (
        1536,
        0.1,
        "assistant",
    )
    assert (
        found.data.template is None
    )  # the tokenizer's: "llama3" is a name of LLaMA-Factory's own, which is said
    assert (found.batch.effective, found.optim.lr, found.train.epochs) == (16, 1e-4, 2.5)
    assert (found.optim.schedule, found.optim.warmup, found.optim.weight_decay) == (
        "cosine",
        0.1,
        0,
    )
    assert (found.train.eval_every, found.train.save_every, found.train.seed) == (250, 500, 42)
    assert (str(found.run.output), found.run.name) == ("saves/llama3-8b/lora", "sft")


def test_axolotl_keeps_its_meaning(tmp_path: Path) -> None:
    found = config(tmp_path, AXOLOTL)
    assert (found.model.source, found.model.method, found.model.recompute) == (
        "org/model-1b",
        "qlora",
        "full",
    )
    lora = found.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (32, 16, 0.05, "all-linear")
    assert [source.path for source in found.data.train_sources] == [
        "data/one.jsonl",
        "data/two.jsonl",
    ]
    assert (found.data.max_length, found.data.eval_fraction, found.data.packing) == (
        4096,
        0.05,
        True,
    )
    assert (found.batch.effective, found.optim.lr, found.optim.name) == (8, 2e-4, "adamw_8bit")
    assert (found.train.epochs, found.optim.schedule, found.model.precision) == (
        4,
        "cosine",
        "auto",
    )
    assert (found.data.mask, found.data.template, found.optim.weight_decay) == (
        "assistant",
        None,
        0,
    )


def test_trl_keeps_its_meaning(tmp_path: Path) -> None:
    found = config(tmp_path, TRL)
    assert (found.model.method, found.model.precision, found.model.recompute) == (
        "lora",
        "autocast_bfloat16",
        "full",
    )
    lora = found.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (
        32,
        16,
        0.05,
        ("q_proj", "v_proj"),
    )
    assert (found.data.max_length, found.data.mask, found.data.packing) == (
        2048,
        "assistant",
        False,
    )
    assert (found.model.source, found.data.train, found.data.template) == (
        "org/model-0.5b",
        "data/capybara.jsonl",
        None,
    )
    assert (found.batch.effective, found.optim.lr, found.train.steps, found.train.epochs) == (
        16,
        2e-4,
        400,
        None,
    )
    assert (found.optim.schedule, found.optim.warmup) == ("constant", 0.05)
    assert found.run.trackers == ("tensorboard",)


def test_minimind_keeps_its_meaning(tmp_path: Path) -> None:
    found = config(tmp_path, MINIMIND, "train.sh")
    assert (found.model.source, found.model.shape.preset) == (
        "../out/pretrain_768.pth",
        "minimind-3",
    )
    assert (found.model.method, found.model.precision) == ("full", "autocast_bfloat16")
    assert (found.data.train, found.data.max_length) == ("../dataset/sft_512.jsonl", 512)
    assert (found.model.tokenizer, found.data.template, found.data.mask) == (
        "../model",
        None,
        "assistant",
    )
    assert (found.batch.effective, found.optim.lr, found.optim.clip) == (256, 1e-5, 0.5)
    assert (found.optim.schedule, found.optim.final_lr_fraction, found.optim.warmup) == (
        "cosine",
        0.1,
        0,
    )
    assert (found.train.epochs, found.train.save_every) == (2, 125)


def test_an_adapter_may_be_described_in_a_mapping_of_its_own(tmp_path: Path) -> None:
    adapter = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps({"per_device_train_batch_size": 4, "peft_config": adapter})
    lora = config(tmp_path, text, "args.json", model="m", data="a.jsonl").model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (4, 8, 0.1, ("q_proj",))


def test_a_json_of_training_arguments_needs_the_model_and_the_data_beside_it(
    tmp_path: Path,
) -> None:
    text = json.dumps(
        {
            "per_device_train_batch_size": 4,
            "learning_rate": "3e-5",
            "output_dir": "out",
            "fp16": True,
        }
    )
    with pytest.raises(ConfigError, match="names no model: give it with --model"):
        imported(tmp_path, text, "args.json")
    found = config(tmp_path, text, "args.json", model="m", data="a.jsonl", devices=4)
    assert (found.batch.effective, found.optim.lr, found.model.precision) == (
        16,
        3e-5,
        "autocast_float16",
    )
    assert (found.optim.schedule, found.train.epochs, found.model.method) == ("linear", 3, "full")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("train_lora.py --batch_size 4", "model.lora.targets", ("q_proj", "o_proj")),
        ("train_lora.py --use_compile 1 --lora_name x", "run.name", "x"),
        ("train_pretrain.py --epochs 1", "model.source", "minimind-3"),
        ("train_full_sft.py --hidden_size 512 --from_weight none", "model.source", "minimind2-small"),
        ("train_full_sft.py --use_moe 1", "model.source", "../out/pretrain_768_moe.pth"),
        ("train_full_sft.py --hidden_size 640", "model.shape.num_heads", 8),
        ("train_full_sft.py --dtype float16", "model.precision", "autocast_float16"),
        ("train_full_sft.py --use_wandb", "run.trackers", ("swanlab",)),
        (HF + "--max_length 64", "data.mask", "all"),
        (HF + "--load_in_4bit", "model.method", "qlora"),
        (HF + "--dtype bfloat16", "model.precision", "bfloat16"),
        (LF + "--pure_bf16", "model.precision", "bfloat16"),
        (LF + "--val_size 50", "eval.max_rows", 50),
        (LF + "--train_on_prompt true", "data.mask", "all"),
        (LF + "--use_rslora --lora_rank 16", "model.lora.rslora", True),
        (LF + "--disable_gradient_checkpointing", "model.recompute", "off"),
        (LF + "--lr_scheduler_type constant --warmup_ratio 0.1", "optim.warmup", 0),
        (HF + "--lr_scheduler_kwargs {\"min_lr\":1e-5} --learning_rate 1e-4", "optim.final_lr_fraction", 0.1),
        (HF + "--adam_beta2 0.95 --max_steps -1", "optim.betas", (0.9, 0.95)),
        (HF + "--chat_template_path chat.jinja", "data.template", "chat.jinja"),
    ],
)  # fmt: skip
def test_a_command_is_read(words: str, key: str, value: object) -> None:
    found: Any = command(words).resolved.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("base_model: m\ndatasets: [a.jsonl]\nbf16: true\n", "bfloat16"),
        ("base_model: m\ndatasets: [a.jsonl]\nfp16: true\n", "autocast_float16"),
        (
            "model_name_or_path: m\ndataset: a.jsonl\nfinetuning_type: full\nbf16: true\n",
            "autocast_bfloat16",
        ),
        ("model_name_or_path: m\ndataset: a.jsonl\nfinetuning_type: full\n", "float32"),
        ("model_name_or_path: m\ndataset_name: a.jsonl\n", "autocast_bfloat16"),
        ("model_name_or_path: m\ndataset_name: a.jsonl\nbf16: false\n", "float32"),
    ],
)
def test_the_precision_follows_what_the_tool_does_with_the_weights(
    text: str, precision: str, tmp_path: Path
) -> None:
    assert config(tmp_path, text).model.precision == precision


def test_a_value_that_means_what_is_done_here_is_not_listed(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ndataset_name: a.jsonl\ntruncation_mode: keep_start\nearly_stopping_patience: 3\n"
    (sentence,) = imported(tmp_path, text).dropped
    assert "early_stopping_patience: 3: here it is 'eval.patience'" in sentence


def test_every_value_says_where_it_comes_from(tmp_path: Path) -> None:
    lines = imported(tmp_path, LLAMA_FACTORY).text.splitlines()
    path = tmp_path / "other.yaml"
    comments = {
        line.split(":")[0].strip(): line.partition("  # ")[2] for line in lines if "  # " in line
    }
    assert comments["lr"] == f"{path}:21 learning_rate"
    assert (
        comments["alpha"]
        == "default of LLaMA-Factory 0.9.5, hparams/finetuning_args.py: twice the rank"
    )
    assert comments["seed"] == "default of transformers 5.23, training_args.py"
    assert comments["effective"] == "per_device_train_batch_size 2 x gradient_accumulation_steps 8"


@pytest.mark.parametrize(
    "text", [LLAMA_FACTORY, AXOLOTL, TRL, MINIMIND], ids=["lf", "axolotl", "trl", "minimind"]
)
def test_the_text_reads_back_as_the_same(text: str, tmp_path: Path) -> None:
    found = imported(tmp_path, text, "other.sh" if text is MINIMIND else "other.yaml")
    (tmp_path / "ours.yaml").write_text(found.text)
    assert read_config(tmp_path / "ours.yaml").config == found.resolved.config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            LLAMA_FACTORY,
            ["dataset identity is a name in", "template: 'llama3' is LLaMA-Factory's own"],
        ),
        (
            AXOLOTL,
            [
                "a sequence of axolotl's batch is a block",
                "set optim.warmup to 10 / the steps of the run",
            ],
        ),
        (MINIMIND, ["the mean of the micro-batches' means", "stand there, or change them"]),
    ],
    ids=["lf", "axolotl", "minimind"],
)
def test_what_means_something_else_is_said(text: str, words: list[str], tmp_path: Path) -> None:
    found = imported(tmp_path, text, "other.sh" if text is MINIMIND else "other.yaml")
    assert all(any(word in sentence for sentence in found.differs) for word in words)


def test_what_has_no_counterpart_is_listed_apart_from_what_makes_no_difference(
    tmp_path: Path,
) -> None:
    found = imported(tmp_path, LLAMA_FACTORY)
    (sentence,) = found.dropped
    assert "neftune_noise_alpha: 5: no noise is added" in sentence
    assert set(found.not_needed) == {
        "stage", "do_train", "preprocessing_num_workers", "flash_attn", "eval_strategy", "dataset_dir",
    }  # fmt: skip
    assert ["special_tokens" in sentence for sentence in imported(tmp_path, AXOLOTL).dropped] == [
        True
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\n", "is of no tool that is known here"),
        (
            "cutoff_len: 8\nmax_samples: 3\nuse_peft: true\n",
            "could be of LLaMA-Factory .max_samples. or TRL .use_peft",
        ),
        (
            "model_name_or_path: m\nlearning_rate: 1\n",
            "say which with --from llama-factory or --from trl",
        ),
        ("just text\n", "is of no tool that is known here"),
        ("model: {source: m}\ndata: {train: a}\n", "is fitune's own already"),
        ("stage: ppo\nmodel_name_or_path: m\n", "only supervised fine-tuning"),
        ("base_model: m\nrl: grpo\n", "only supervised fine-tuning"),
        ("finetuning_type: oft\nmodel_name_or_path: m\n", "all weights .full. or adapters"),
        (
            "finetuning_type: lora\nmodel_name_or_path: m\n",
            "names no training data: give it with --data",
        ),
        (
            "base_model: m\nmicro_batch_size: auto\n",
            "micro_batch_size: 'auto': a number is needed here",
        ),
        ("base_model: m\nmicro_batch_size: 0\ndatasets: [a]\n", "a number above 0 is needed"),
        (
            "base_model: m\nsequence_len: 4\ndatasets: [a]\n",
            r"data.max_length is 4: it must be .* \(\S+:2 sequence_len\)",
        ),
        ("base_model: [\n", "not valid YAML"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_in_one_sentence(
    text: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        imported(tmp_path, text)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("python train_dpo.py --accumulation_steps 2", "of minimind's scripts only"),
        (
            "train_full_sft.py --hidden_size 640 --from_weight none",
            "give one of the presets with --model",
        ),
        ("train_full_sft.py --data_path $DATA", "a variable of the shell"),
    ],
)
def test_a_command_that_cannot_be_carried_over_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(words)


NAMES = st.sampled_from(
    [
        *KEYS_OF_OTHER_TOOLS,
        "warmup_steps",
        "peft_config",
        "lr_scheduler_kwargs",
        "save_steps",
        "rl",
        "bf16",
    ]
)
NAMED = sorted(
    {*NOT_NEEDED, *OTHER_TRAINING, *(name for tool in TOOLS.values() for name in tool.keys)}
)
SCALARS = st.sampled_from(
    [
        0,
        1,
        -1,
        0.5,
        1e400,
        True,
        "auto",
        "7",
        "lora",
        "cosine",
        "",
        [],
        ["a"],
        {},
        {"r": "x", "use_rslora": True},
        {"min_lr": 1, "a": None},
        [{}],
    ]
)
TOOL_NAMES = st.sampled_from(list(TOOLS))


@given(TOOL_NAMES, st.dictionaries(NAMES, SCALARS, max_size=6))
def test_no_arguments_end_in_anything_but_faults(tool: Any, values: dict[str, Any]) -> None:
    with suppress(ConfigError):
        translate(
            ToolArguments(tool, "f", values, dict.fromkeys(values, "f:1")), model="m", data="a"
        )


@given(TOOL_NAMES, st.dictionaries(st.sampled_from([*NAMED, "unheard_of"]), SCALARS, max_size=6))
def test_no_argument_vanishes(tool: Any, values: dict[str, Any]) -> None:
    """Each is the origin of a value, or named in one of the lists."""
    values = {name: value for name, value in values.items() if not isinstance(value, dict)}
    with suppress(ConfigError):
        found = translate(
            ToolArguments(tool, "f", values, dict.fromkeys(values, "f:1")), model="m", data="a"
        )
        told = " ".join([found.text, *found.differs, *found.dropped, *found.not_needed])
        assert [name for name in values if not re.search(rf"\b{re.escape(name)}\b", told)] == []


def test_the_command_writes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trl.yaml").write_text(TRL)
    output = tmp_path / "new" / "ours.yaml"
    assert main(["config", "import", str(tmp_path / "trl.yaml"), "-o", str(output)]) == 0
    said = capsys.readouterr().err
    assert "trl.yaml is of TRL" in said
    assert f"{output} is written; next: fitune check {output}   fitune plan {output}" in said
    assert read_config(output).config.batch.effective == 16
    assert main(["config", "import", str(tmp_path / "trl.yaml"), "-o", str(output)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_command_may_follow_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["python", "train_full_sft.py", "--batch_size", "16", "--accumulation_steps", "8"]
    assert main(["config", "import", "--devices", "2", "--", *words]) == 0
    assert "effective: 256" in capsys.readouterr().out


def test_all_training_arguments_as_transformers_writes_them_leave_nothing_over(
    tmp_path: Path,
) -> None:
    """The names and values of TrainingArguments(output_dir='out').to_dict(), those that are not null."""
    transformers = pytest.importorskip("transformers")
    text = json.dumps(transformers.TrainingArguments(output_dir="out", use_cpu=True).to_dict())
    found = imported(tmp_path, text, "args.json", model="m", data="a.jsonl")
    assert found.dropped == ()
    assert found.resolved.config.optim.lr == 5e-5


def test_preferences_of_llama_factory_become_an_objective(tmp_path: Path) -> None:
    text = "stage: dpo\nmodel_name_or_path: m\ndataset: d.json\nfinetuning_type: full\npref_beta: 0.2\n"
    config = imported(tmp_path, text).resolved.config
    assert (config.objective, config.preference.beta) == ("dpo", 0.2)
    config = imported(tmp_path, f"{text}pref_loss: simpo\nsimpo_gamma: 0.7\n").resolved.config
    assert (config.objective, config.preference.simpo_gamma) == ("simpo", 0.7)
    config = imported(tmp_path, f"{text}pref_loss: ipo\n").resolved.config
    assert config.preference.loss_type == "ipo"
    for line, reason in (
        ("pref_loss: kto_pair", "fitune has the losses sigmoid, hinge, ipo, orpo and simpo"),
        ("pref_ftx: 0.5", "adds no loss of imitating"),
    ):
        with pytest.raises(ConfigError, match=reason):
            imported(tmp_path, f"{text}{line}\n")
