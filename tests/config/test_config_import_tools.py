"""Which tool a configuration is of, what that tool does where its file is silent, and what is another training."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fitune.cli.app import main
from fitune.config import FreezeConfig, RunConfig, read_config
from fitune.config.importers.read import read_command, read_tool_file
from fitune.config.importers.tools import TOOLS
from fitune.config.importers.translate import ImportedConfig, translate
from fitune.errors import ConfigError

CASES = Path(__file__).parents[1] / "foreign" / "configs"
SWIFT = "swift sft --model m --dataset d.jsonl "
LF = "llamafactory-cli train --model_name_or_path m --dataset d.json "
V1 = "model: m\ntrain_dataset: d.jsonl\n"


def case(name: str, **options: Any) -> ImportedConfig:
    return translate(read_tool_file(CASES / name), **options)


def command(text: str) -> ImportedConfig:
    return translate(read_command(text.split()))


def imported(tmp_path: Path, text: str, name: str = "other.yaml", **options: Any) -> ImportedConfig:
    (tmp_path / name).write_text(text)
    return translate(read_tool_file(tmp_path / name), **options)


def value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_a_script_of_ms_swift_is_read_as_its_own() -> None:
    found = case("swift.sh")
    config = found.resolved.config
    assert found.tool == "ms-swift"
    assert (config.model.source, config.model.method, config.model.precision) == (
        "my-model",
        "lora",
        "bfloat16",
    )
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (8, 32, 0.05, "all-linear")
    assert (config.data.train, config.data.max_length, config.data.too_long) == (
        "sft.jsonl#500",
        2048,
        "drop",
    )
    assert (config.data.mask, config.data.eval_fraction) == ("assistant", 0.0)
    assert (config.batch.effective, config.optim.lr, config.optim.schedule) == (16, 1e-4, "cosine")
    assert (config.optim.betas, config.optim.weight_decay, config.optim.warmup) == (
        (0.9, 0.95),
        0.1,
        0.05,
    )
    assert any("system: 'You are a helpful assistant.'" in sentence for sentence in found.dropped)


def test_ms_swift_is_silent_and_its_defaults_hold() -> None:
    found = case("swift_defaults.sh")
    config = found.resolved.config
    assert (config.optim.lr, config.model.lora.alpha) == (1e-4, 32)
    assert any("as long as the model allows" in sentence for sentence in found.differs)


def test_the_names_of_ms_swift_2_have_its_defaults() -> None:
    found = case("swift_model_given.sh")
    config = found.resolved.config
    assert (found.tool, config.model.source, config.batch.effective) == (
        "ms-swift 2",
        "my-model",
        16,
    )
    assert (config.data.eval_fraction, config.optim.warmup, config.train.epochs) == (0.01, 0.05, 1)
    assert any("target modules are not named" in sentence for sentence in found.differs)


def test_version_1_of_llama_factory_is_read() -> None:
    found = case("lf_v1.yaml")
    config = found.resolved.config
    assert (found.tool, config.model.source, config.model.method) == (
        "LLaMA-Factory v1",
        "my-model",
        "lora",
    )
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 32, 0.05, "all-linear")
    assert (config.data.train, config.data.max_length, config.batch.effective) == (
        "sft.jsonl",
        2048,
        1,
    )
    assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (
        1e-4,
        "constant",
        0.01,
    )
    assert (config.train.steps, config.run.name) == (10, "test_lora")


def test_what_llama_board_saves_is_read_as_llama_factory() -> None:
    found = case("llamaboard.yaml", data="sft.jsonl")
    config = found.resolved.config
    assert (found.tool, config.model.source, config.model.method) == (
        "LLaMA-Factory",
        "my-model",
        "lora",
    )
    assert (config.model.lora.rank, config.model.lora.alpha, config.data.max_length) == (
        8,
        16,
        2048,
    )
    assert (config.batch.effective, config.optim.lr, config.optim.schedule) == (16, 5e-5, "cosine")
    assert config.train.epochs == 3
    assert "top.model_name" in found.not_needed


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("torchtune.yaml", ["is of torchtune, whose recipes are not read"]),
        ("litgpt.yaml", ["is of litgpt, whose recipes are not read"]),
        ("trl_config.yaml", [":12 loss_type: 'dft': fitune trains with the plain cross-entropy"]),
    ],
)
def test_what_is_another_training_or_not_read_is_named(name: str, sentences: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        case(name)
    faults = caught.value.faults
    assert all(sentence in fault for sentence, fault in zip(sentences, faults, strict=True))


def test_a_part_of_the_data_is_refused_unless_the_data_is_given_otherwise(tmp_path: Path) -> None:
    text = (CASES / "trl_config.yaml").read_text().replace("loss_type: dft\n", "")
    with pytest.raises(
        ConfigError, match=r"dataset_train_split: 'train\[:10%\]': .* give it with --data"
    ):
        imported(tmp_path, text)
    found = imported(tmp_path, text, data="mine.jsonl")
    assert found.resolved.config.data.train == "mine.jsonl"
    assert {"dataset_name", "dataset_config", "dataset_train_split"} <= found.not_needed.keys()
    assert [sentence.split()[1] for sentence in found.dropped] == [
        "chat_template_kwargs:", "neftune_noise_alpha:", "early_stopping_patience:",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (SWIFT, "optim.lr", 1e-4),
        (SWIFT, "batch.effective", 16),
        (SWIFT, "train.epochs", 3),
        (SWIFT, "model.method", "lora"),
        (SWIFT, "data.eval_fraction", 0),
        (SWIFT, "optim.weight_decay", 0.1),
        (SWIFT, "optim.betas", (0.9, 0.95)),
        (SWIFT, "model.lora.rank", 8),
        (SWIFT, "model.lora.alpha", 32),
        (SWIFT, "model.lora.dropout", 0.05),
        (SWIFT, "model.lora.targets", "all-linear"),
        (SWIFT, "optim.schedule", "cosine"),
        (SWIFT, "optim.warmup", 0),
        (SWIFT, "model.precision", "bfloat16"),
        (SWIFT + "--tuner_type full", "optim.lr", 1e-5),
        (SWIFT + "--per_device_train_batch_size 5", "batch.effective", 20),
        (SWIFT + "--torch_dtype float32", "model.precision", "autocast_float16"),
        (SWIFT + "--torch_dtype float32 --bf16 true", "model.precision", "autocast_bfloat16"),
        (SWIFT + "--loss_scale all", "data.mask", "all"),
        (SWIFT + "--quant_bits 4 --quant_method bnb", "model.method", "qlora"),
        (SWIFT + "--truncation_strategy right", "data.too_long", "truncate"),
        (SWIFT + "--target_modules q_proj v_proj", "model.lora.targets", ("q_proj", "v_proj")),
        (SWIFT + "--val_dataset e.jsonl", "data.eval", "e.jsonl"),
        ("NPROC_PER_NODE=2 " + SWIFT + "--gradient_accumulation_steps 3", "batch.effective", 6),
        ("NPROC_PER_NODE=4 NNODES=2 " + SWIFT, "batch.effective", 16),
        ("torchrun --nproc_per_node 4 swift/cli/sft.py --model m --dataset d.jsonl", "optim.weight_decay", 0.1),
        ("swift pt --model m --dataset d.jsonl", "data.mask", "all"),
        ("swift pt --model m --dataset d.jsonl --truncation_strategy split", "data.too_long", "split"),
        (LF + "--stage pt", "data.wrapped", True),
        (LF + "--val_size 0.1 --early_stopping_steps 3", "eval.patience", 3),
        (LF + "--stage pt --packing false", "data.wrapped", False),
        (LF, "model.precision", "bfloat16"),
        (LF + "--finetuning_type full", "model.precision", "float32"),
        (LF + "--bf16 true --finetuning_type full", "model.precision", "autocast_bfloat16"),
        (LF + "--lora_rank 4", "model.lora.alpha", 8),
        (LF, "data.max_length", 2048),
        ("CUDA_VISIBLE_DEVICES=0,1 " + LF, "batch.effective", 16),
        (LF + "--train_from_scratch true", "model.init", "random"),
        (LF + "--flash_attn disabled", "model.attention", "eager"),
    ],
)  # fmt: skip
def test_a_default_is_the_tool_s(words: str, key: str, expected: object) -> None:
    assert value(command(words).resolved.config, key) == expected


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("base_model: m\ndatasets: [a.jsonl]\n", "model.precision", "bfloat16"),
        ("base_model: m\ndatasets: [a.jsonl]\nadapter: lora\n", "model.precision", "auto"),
        ("base_model: m\ndatasets: [a.jsonl]\nbf16: false\n", "model.precision", "float32"),
        ("base_model: m\ndatasets: [a.jsonl]\n", "data.too_long", "drop"),
        (
            "base_model: m\ndatasets: [{path: a.jsonl, type: completion}]\n",
            "data.too_long",
            "split",
        ),
        ("base_model: m\npretraining_dataset: org/a\n", "data.too_long", "truncate"),
        (
            "base_model: m\npretraining_dataset: [{path: org/a, text_column: t}]\n",
            "data.columns.text",
            "t",
        ),
        ("base_model: m\ndatasets: [a.jsonl]\n", "data.max_length", 512),
        ("base_model: m\ndatasets: [a.jsonl]\n", "optim.warmup", 0.03),
        (
            "base_model: m\ndatasets: [a.jsonl]\nexcess_length_strategy: truncate\n",
            "data.too_long",
            "truncate",
        ),
        (
            "base_model: m\ndatasets: [a.jsonl]\nuse_tensorboard: true\n",
            "run.trackers",
            ("tensorboard",),
        ),
        (V1, "model.precision", "float32"),
        (V1 + "dist_config: {name: fsdp2}\n", "model.precision", "autocast_bfloat16"),
        (V1, "optim.lr", 1e-4),
        (V1, "train.epochs", 3),
        (V1 + "global_batch_size: 32\n", "batch.effective", 32),
        (
            V1 + "peft_config: {name: lora}\nquant_config: {name: bnb, quantization_bit: 4}\n",
            "model.method",
            "qlora",
        ),
        (
            "model: m\ndataset: [d.jsonl, 'e.jsonl#5']\ntuner_type: lora\n",
            "optim.weight_decay",
            0.1,
        ),
        ("model: m\ndataset: d.jsonl\nlora_rank: 4\n", "model.lora.alpha", 32),
    ],
)
def test_a_default_of_a_file_is_the_tool_s(
    text: str, key: str, expected: object, tmp_path: Path
) -> None:
    assert value(imported(tmp_path, text).resolved.config, key) == expected


def test_the_defaults_of_transformers_are_those_of_the_library() -> None:
    transformers = pytest.importorskip("transformers")
    fields = {
        field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)
    }
    rows = TOOLS["transformers"].rows["training_args.py"]
    assert {
        name: fields[name]
        for name, (_, default) in rows.items()
        if default is not None and name in fields
    } == {
        name: default
        for name, (_, default) in rows.items()
        if default is not None and name in fields
    }


def test_the_defaults_of_trl_are_those_of_the_library() -> None:
    trl = pytest.importorskip("trl")
    fields = {
        f.name: f.default
        for kind in (trl.SFTConfig, trl.ModelConfig)
        for f in dataclasses.fields(kind)
    }
    rows = {name: row for file in TOOLS["TRL"].rows.values() for name, row in file.items()}
    told = {
        name: default
        for name, (_, default) in rows.items()
        if default is not None and name in fields
    }
    assert fields["bf16"] is None  # which its __post_init__ makes true
    assert told == {name: fields[name] for name in told} | {"bf16": True}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=lambda tool: tool.name)
def test_every_default_names_its_source_and_no_own_name_is_another_s(tool: Any) -> None:
    assert all(tool.defaults[key].source.partition(", ")[2] for key in tool.defaults)
    others = [
        other for other in TOOLS.values() if other.name != tool.name and tool.name not in other.name
    ]
    taken = {name for other in others for name in (*other.unique_names, *other.keys)}
    assert not tool.unique_names & taken


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("model: m\ndataset: d.jsonl\nlora_rank: 8\nmax_length: 100\n", "ms-swift"),
        (
            "model_name_or_path: m\ndataset: d.json\ncutoff_len: 100\nlora_rank: 8\n",
            "LLaMA-Factory",
        ),
        ("model_name_or_path: m\nmax_length: 100\ndatasets: [d]\n", "TRL"),
        (V1 + "cutoff_len: 100\n", "LLaMA-Factory v1"),
        ("model_id_or_path: m\ndataset: d\nlora_rank: 8\n", "ms-swift 2"),
    ],
)
def test_names_that_several_tools_share_tell_by_which_has_them_all(
    text: str, tool: str, tmp_path: Path
) -> None:
    assert imported(tmp_path, text).tool == tool


def test_where_two_could_be_meant_from_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\nlearning_rate: 1.0e-4\n")
    words = ["config", "import", str(tmp_path / "a.yaml"), "--data", "d.jsonl"]
    assert main(words) == 2
    assert (
        "could be of LLaMA-Factory or TRL: say which with --from llama-factory or --from trl"
        in capsys.readouterr().err
    )
    assert main([*words, "--from", "llama-factory"]) == 0
    assert "method: lora" in capsys.readouterr().out
    assert main([*words, "--from", "elsewhere"]) == 2
    assert "--from elsewhere: give one of llama-factory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("swift rlhf --rlhf_type grpo --model m --dataset d", "only supervised fine-tuning, DPO"),
        ("swift infer --model m", "'swift infer' is neither supervised fine-tuning nor DPO"),
        ("megatron sft --load m", "is of Megatron-SWIFT"),
        ("tune run lora_finetune_single_device --config c", "is of torchtune"),
        ("litgpt finetune_lora m", "is of litgpt"),
        ("trl grpo --model_name_or_path m", "'trl grpo' is neither supervised fine-tuning nor DPO"),
        (SWIFT + "--tuner_type adalora", "all weights .full. or adapters"),
        (SWIFT + "--task_type seq_cls", "only supervised fine-tuning"),
        (SWIFT + "--loss_scale hermes", "plain cross-entropy"),
        (SWIFT + "--enable_dft_loss true", "plain cross-entropy"),
        (SWIFT + "--freeze_parameters_ratio 0.5", "all weights .full. or adapters"),
        (SWIFT + "--adapters out/checkpoint-5", "merge the adapter first"),
        (SWIFT + "--quant_bits 3 --quant_method hqq", "in 16 bits here, or in 4"),
        (LF + "--loftq_config x", "LoRA on linear layers of one rank"),
        (SWIFT + "--init_weights loftq", "model.lora.init is 'loftq'"),
        (LF + "--use_dora --quantization_bit 4", "model.lora.dora true needs weights that are not"),
        (LF + "--use_galore true", "Muon, APOLLO, Adafactor and SGD"),
        (LF + "--new_special_tokens_config x", "adds tokens by their text alone"),
        (LF + "--rope_scaling linear", "config.json describes it"),
        (LF + "--stage dpo --label_smoothing_factor 0.1", "no effect while objective is dpo"),
        ("swift sft --model m --dataset org/d:zh#5", "a hub's split 'train' and default subset"),
        ("swift sft gone.yaml", "names the configuration gone.yaml, which cannot be read"),
    ],
)  # fmt: skip
def test_another_training_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command(words)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (LF + "--use_muon true", "muon"),
        (LF + "--use_apollo true --apollo_rank 16 --optim adamw_torch", "apollo"),
        (SWIFT + "--optim muon", "muon"),
        (SWIFT + "--optim apollo_adamw", "apollo"),
    ],
)
def test_optimizers_for_matrices_are_taken_over(words: str, name: str) -> None:
    found = command(words)
    assert found.resolved.config.optim.name == name
    assert any("APOLLO" in sentence for sentence in found.differs) == (name == "apollo")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (LF + "--pissa_init true --pissa_convert true", (False, False, "pissa_niter_16")),
        (LF + "--pissa_init true --pissa_iter -1 --use_dora", (False, True, "pissa")),
        (SWIFT + "--use_rslora true --init_weights olora", (True, False, "olora")),
        (SWIFT + "--use_dora true --init_weights true", (False, True, "default")),
        (
            "trl sft --model_name_or_path m --dataset_name d --use_peft --use_rslora --use_dora",
            (True, True, "default"),
        ),
    ],
)
def test_the_variants_of_lora_are_taken_over(words: str, expected: tuple[bool, bool, str]) -> None:
    lora = command(words).resolved.config.model.lora
    assert (lora.rslora, lora.dora, lora.init) == expected


def test_new_tokens_and_layers_beside_adapters_are_taken_over() -> None:
    for name in ("axolotl_lora_save.yml", "lf_two_sources.yaml"):
        model = case(name).resolved.config.model
        assert model.new_tokens == ("<tool>", "</tool>")
        assert model.lora.modules_to_save == ("embed_tokens", "lm_head")
    found = command(SWIFT + "--new_special_tokens <a> <b>")
    assert found.resolved.config.model.new_tokens == ("<a>", "<b>")
    assert any("rows of embedding and head are trained" in each for each in found.differs)
    full = command(LF + "--finetuning_type full --add_tokens <a>,<b> --additional_target norm")
    assert full.resolved.config.model.new_tokens == ("<a>", "<b>")
    assert "additional_target" in full.not_needed


def test_label_smoothing_is_taken_over() -> None:
    assert command(LF + "--label_smoothing_factor 0.1").resolved.config.train.label_smoothing == 0.1


def test_frozen_layers_of_llama_factory_are_taken_over() -> None:
    words = LF + "--finetuning_type freeze --freeze_trainable_layers -3 "
    found = command(words + "--freeze_trainable_modules mlp,self_attn --freeze_extra_modules norm")
    model = found.resolved.config.model
    assert (model.method, model.precision) == ("freeze", "bfloat16")
    assert model.freeze.trained_layers == -3
    assert model.freeze.trained_modules == ("mlp", "self_attn")
    assert model.freeze.extra_modules == ("norm",)
    assert command(LF + "--finetuning_type freeze").resolved.config.model.freeze == FreezeConfig()


@pytest.mark.parametrize(
    "switched_off",
    [
        "--use_dora false",
        "--stage sft",
        "--label_smoothing_factor 0",
        "--use_galore false",
        "--resize_vocab false",
    ],
)
def test_another_training_that_is_switched_off_is_none(switched_off: str) -> None:
    name = switched_off.split()[0].removeprefix("--")
    assert name in command(LF + switched_off).not_needed


def test_the_attention_of_the_file_is_named_with_the_reason_why_it_is_not_used() -> None:
    assert "the fastest kernel" in command(LF + "--flash_attn fa2").not_needed["flash_attn"]


def test_a_command_takes_the_rest_from_the_file_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(CASES / "lf_v1.yaml", tmp_path)
    (tmp_path / "lf.yaml").write_text(
        "model_name_or_path: m\ndataset: d.json\nlearning_rate: 1.0e-4\n"
    )
    assert (
        command("llamafactory-cli train lf.yaml learning_rate=3e-5").resolved.config.optim.lr
        == 3e-5
    )
    assert command("accelerate launch src/train.py lf.yaml").tool == "LLaMA-Factory"


def test_variables_and_sums_of_a_shell_script_are_put_in(tmp_path: Path) -> None:
    text = (
        "export NPROC_PER_NODE=2\nnproc=4\nMODEL=my-model\nARGS='--lora_rank 4 --lora_alpha 8'\n"
        "swift sft \\\n  --model $MODEL --dataset d.jsonl $ARGS \\\n"
        "  --gradient_accumulation_steps $(expr 32 / $nproc)\n"
        "swift infer --adapters out\n"
    )
    config = imported(tmp_path, text, "run.sh").resolved.config
    assert (config.model.source, config.model.lora.rank, config.batch.effective) == (
        "my-model",
        4,
        16,
    )


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"file_name": "d.json", "ranking": True}, "ranking: preferred and rejected"),
        ({"hf_hub_url": "org/d", "split": "test"}, "a hub's split 'train'"),
        ({"hf_hub_url": "org/d", "subset": "zh"}, "a hub's split 'train'"),
    ],
)
def test_the_list_of_llama_factory_s_data_is_read_with_what_it_says_of_them(
    entry: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    text = f"model_name_or_path: m\ndataset: d\ndataset_dir: {tmp_path}\n"
    with pytest.raises(ConfigError, match=sentence):
        imported(tmp_path, text)


def test_a_sample_of_llama_factory_s_data_stays_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"d": {"file_name": "d.json", "num_samples": 7}})
    )
    text = f"model_name_or_path: m\ndataset: d\ndataset_dir: {tmp_path}\n"
    assert imported(tmp_path, text).resolved.config.data.train == f"{tmp_path}/d.json#7"


def test_the_list_of_version_1_s_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text(
        "one: {path: a.json, source: local, size: 5}\ntwo: {path: org/b}\n"
    )
    config = imported(tmp_path, "model: m\ntrain_dataset: data.yaml\n").resolved.config
    assert [source.path for source in config.data.train_sources] == ["a.json#5", "org/b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_configuration_is_read_as_windows_writes_it(encoding: str, tmp_path: Path) -> None:
    text = "model: {source: 模型}\r\ndata: {train: sft.jsonl}\r\n"
    (tmp_path / "a.yaml").write_bytes(text.encode(encoding))
    assert read_config(tmp_path / "a.yaml").config.model.source == "模型"


def test_another_encoding_and_a_windows_path_in_quotes_are_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "gbk.yaml").write_bytes("# 模型\nmodel: {source: m}\n".encode("gbk"))
    with pytest.raises(ConfigError, match="byte 4 is not UTF-8; save it in that encoding"):
        read_config(tmp_path / "gbk.yaml")
    (tmp_path / "path.yaml").write_text('model: {source: "D:\\models\\qwen"}\n')
    with pytest.raises(ConfigError, match="stands without quotes, or in single ones"):
        read_config(tmp_path / "path.yaml")


AXOLOTL = "base_model: m\nmicro_batch_size: 1\nlearning_rate: 1e-5\ndatasets:\n  - path: a.jsonl\n"


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (
            f"{AXOLOTL}    type: {{field_instruction: ask, field_output: reply, field_input: about}}\n",
            {"prompt": "ask", "completion": "reply", "input": "about"},
        ),
        (
            f"{AXOLOTL}    type: chat_template\n    field_messages: talk\n"
            "    message_property_mappings: {role: who, content: what}\n",
            {"messages": "talk", "role": "who", "content": "what"},
        ),
        (f"{AXOLOTL}    type: completion\n    field: body\n", {"text": "body"}),
        (f"{AXOLOTL}    type: chat_template\n    field_messages: messages\n", {}),
    ],
)
def test_the_columns_that_axolotl_names_are_ours(
    text: str, columns: dict[str, str], tmp_path: Path
) -> None:
    assert imported(tmp_path, text, "a.yml").resolved.config.data.columns.named == columns


def test_the_columns_of_several_sources_are_told_where_they_differ(tmp_path: Path) -> None:
    text = f"{AXOLOTL}    type: completion\n    field: body\n  - path: b.jsonl\n    type: alpaca\n"
    found = imported(tmp_path, text, "a.yml")
    assert not found.resolved.config.data.columns.named
    assert any(
        "columns text=body: data.columns is one for all sources" in sentence
        for sentence in found.differs
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "type: bradley_terry.chat_template",
            "only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported",
        ),
        (
            "type: chatml.intel",
            "only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported",
        ),
        ("type: input_output", "segments with labels of their own"),
        ("roles_to_train: [user, assistant]", "here the assistant's messages are learned"),
        ("message_field_training: keep", "call that key 'train' in the samples"),
    ],
)
def test_rows_of_axolotl_that_are_learned_otherwise_are_refused(
    more: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        imported(tmp_path, f"{AXOLOTL}    {more}\n", "a.yml")


@pytest.mark.parametrize(
    ("entry", "columns"),
    [
        (
            {
                "columns": {
                    "prompt": "ask",
                    "response": "reply",
                    "query": "about",
                    "history": "before",
                }
            },
            {"prompt": "ask", "completion": "reply", "input": "about", "history": "before"},
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk"},
                "tags": {"role_tag": "who"},
            },
            {"messages": "talk", "role": "who"},
        ),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output"}}, {}),
        ({"columns": {"prompt": "body"}}, {"text": "body"}),
    ],
)
def test_the_columns_in_llama_factory_s_list_are_ours(
    entry: dict[str, Any], columns: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "a.json", **entry}})
    )
    found = command(LF.replace("d.json", "mine"))
    assert found.resolved.config.data.columns.named == columns


@pytest.mark.parametrize("key", ["kto_tag", "images"])
def test_data_of_other_training_in_llama_factory_s_list_is_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    entry = {"file_name": "a.json", "columns": {"prompt": "a", "response": "b", key: "c"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(ConfigError, match=f"columns: {key}"):
        command(LF.replace("d.json", "mine"))


@pytest.mark.parametrize(
    "more",
    [
        "num_generations: 8",
        "beta: 0.1",
        "max_prompt_length: 512",
        "center_rewards_coefficient: 0.01",
    ],
)
def test_preference_and_reward_training_of_trl_is_refused(more: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported"
    ):
        imported(tmp_path, f"model_name_or_path: m\ndataset_name: d.jsonl\n{more}\n")


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (
            "torchrun train.py --model_name_or_path m --data_path d.json\n",
            "a.sh",
            "could be of LLaMA-Factory or TRL",
        ),
        (
            "python train_dpo.py --epochs 2\n",
            "a.sh",
            "'train_dpo.py' is neither supervised fine-tuning",
        ),
        (
            "python unsloth-cli.py --model_name m\n",
            "a.sh",
            "is of Unsloth, whose recipes are not read",
        ),
        (
            "from trl import SFTConfig\n",
            "a.py",
            "is a program, whose arguments only running it tells",
        ),
    ],
)
def test_a_program_that_is_not_read_is_named_as_what_it_is(
    text: str, name: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        imported(tmp_path, text, name)


def test_a_module_of_llama_factory_takes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("model_name_or_path: m\ndataset: d.json\nstage: sft\n")
    found = imported(
        tmp_path, "CUDA_VISIBLE_DEVICES=0,1 python -m llamafactory.cli train x.yaml\n", "run.sh"
    )
    assert (found.tool, found.resolved.config.batch.effective) == ("LLaMA-Factory", 16)


def test_names_of_other_scripts_of_transformers_tell_no_tool(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ndataset_name: d.jsonl\npreprocessing_num_workers: 2\nmax_seq_length: 512\n"
    assert imported(tmp_path, text).tool == "TRL"


TRL_DPO = "trl dpo --model_name_or_path m --dataset_name d.jsonl "
RLHF = "swift rlhf --model m --dataset d.jsonl "


@pytest.mark.parametrize(
    ("words", "objective", "preference", "lr"),
    [
        (TRL_DPO, "dpo", {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0}, 1e-6),
        (TRL_DPO + "--loss_type robust --label_smoothing 0.1 --beta 0.3 --learning_rate 1e-5",
         "dpo", {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1}, 1e-5),
        ("trl kto --model_name_or_path m --dataset_name d.jsonl --undesirable_weight 2",
         "kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 2}, 1e-6),
        ("python orpo.py --model_name_or_path m --dataset_name d.jsonl --beta 0.2",
         "orpo", {"beta": 0.2}, 1e-6),
        (RLHF, "dpo", {"beta": 0.1, "loss_type": "sigmoid"}, 1e-4),
        (RLHF + "--rlhf_type simpo --cpo_alpha 0", "simpo", {"beta": 2.0, "simpo_gamma": 1.0}, 1e-4),
        (RLHF + "--rlhf_type kto --desirable_weight 1.5", "kto", {"desirable_weight": 1.5}, 1e-4),
    ],
)  # fmt: skip
def test_commands_of_preferences_become_an_objective(
    words: str, objective: str, preference: dict[str, object], lr: float
) -> None:
    found = command(words)
    config = found.resolved.config
    assert config.objective == objective
    assert preference.items() <= config.preference.model_dump().items()
    assert config.optim.lr == lr
    assert found.dropped == ()


@pytest.mark.parametrize(
    ("lines", "objective", "preference"),
    [
        ("rl: dpo\nrl_beta: 0.2\ndpo_label_smoothing: 0.1\n", "dpo", {"beta": 0.2, "label_smoothing": 0.1}),
        ("rl: ipo\n", "dpo", {"loss_type": "ipo"}),
        ("rl: orpo\norpo_alpha: 0.3\n", "orpo", {"beta": 0.3}),
        ("rl: simpo\nsimpo_gamma: 0.4\ncpo_alpha: 0\n", "simpo", {"simpo_gamma": 0.4}),
        ("rl: kto\nkto_undesirable_weight: 0.2\n", "kto", {"undesirable_weight": 0.2}),
    ],
)  # fmt: skip
def test_preferences_of_axolotl_become_an_objective(
    lines: str, objective: str, preference: dict[str, object], tmp_path: Path
) -> None:
    text = f"base_model: m\nlearning_rate: 1e-5\ndatasets:\n  - path: d.jsonl\n    type: chatml.intel\n{lines}"
    found = imported(tmp_path, text, "a.yml")
    assert found.resolved.config.objective == objective
    assert preference.items() <= found.resolved.config.preference.model_dump().items()
    assert found.dropped == ()
    assert any("type chatml.intel: the samples' own keys" in line for line in found.differs)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (TRL_DPO + "--loss_type sigmoid bco_pair", "fitune has the losses sigmoid, hinge, ipo and robust"),
        (TRL_DPO + "--sync_ref_model true", "it makes another loss"),
        (TRL_DPO + "--f_divergence_type js_divergence", "it makes another loss"),
        ("trl kto --model_name_or_path m --dataset_name d --loss_type apo_zero_unpaired", "one loss of objective kto"),
        (RLHF + "--rpo_alpha 1", "adds no loss of imitating"),
        (RLHF + "--rlhf_type simpo --cpo_alpha 1", "adds no loss of imitating"),
        (RLHF + "--rlhf_type cpo", "only supervised fine-tuning, DPO"),
        (RLHF + "--ref_model other", "only supervised fine-tuning, DPO"),
    ],
)  # fmt: skip
def test_other_losses_of_preferences_are_refused_in_one_sentence(words: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        command(words)
    assert len(caught.value.faults) == 1


def test_ranked_and_labelled_data_of_llama_factory_s_list_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    pairs = {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"}
    ranked = {"file_name": "a.json", "ranking": True, "columns": pairs}
    labelled = {
        "file_name": "b.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "fine"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"pairs": ranked, "answers": labelled})
    )
    found = command(f"{LF.replace('d.json', 'pairs')} --stage dpo").resolved.config
    assert found.data.columns.named == {"chosen": "good", "rejected": "bad"}
    weights = "--kto_chosen_weight 1.2 --kto_rejected_weight 0.8"
    found = command(f"{LF.replace('d.json', 'answers')} --stage kto {weights}").resolved.config
    assert (found.objective, found.data.columns.named) == ("kto", {"label": "fine"})
    assert (found.preference.desirable_weight, found.preference.undesirable_weight) == (1.2, 0.8)
