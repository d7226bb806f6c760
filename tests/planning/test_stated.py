"""What a prediction says of itself: the versions it is of, what it is an upper bound of, what stays unquantised."""

import copy
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

import fitune
from fitune.allocator.prediction import Prediction
from fitune.cli.app import main
from fitune.config import ModelConfig
from fitune.errors import ModelError, UsageError
from fitune.model.load import build_model, load_model, load_tokenizer
from fitune.model.save import save_model
from fitune.planning.plan import closest
from fitune.planning.search import choose_plan
from fitune.planning.stated import model_notes
from fitune.recorder.events import COMPILED
from fitune.training.prepare import follow
from tiny_models import TINY_DBRX, TINY_LLAMA, save_tokenizer

VERSIONS = f"predicted for torch {torch.__version__}, transformers {version('transformers')}, peft {version('peft')}"
MXFP4_CONFIG = GptOssConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    layer_types=["sliding_attention", "full_attention"], sliding_window=4, architectures=["GptOssForCausalLM"],
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip


def write_config(directory: Path, *, compiled: bool = False, **model: object) -> dict[str, Any]:
    TINY_LLAMA.save_pretrained(directory / "model")
    return {
        "model": {
            "source": str(directory / "model"),
            "init": "random",
            "compile": compiled,
            "recompute": "off",
        }
        | model,
        "data": {"train": "x.jsonl", "max_length": 32},
        "batch": {"effective": 1},
    }


def build() -> nn.Module:
    return nn.Linear(8, 8)


def plain_loop(model: nn.Module, device: torch.device) -> Callable[[], None]:
    def step() -> None:
        model(torch.ones(2, 8, device=device)).sum().backward()

    return step


def compiled_loop(model: nn.Module, device: torch.device) -> Callable[[], None]:
    return plain_loop(torch.compile(model), device)  # type: ignore[arg-type]


def decorated_loop(model: nn.Module, device: torch.device) -> Callable[[], None]:
    @torch.compile(dynamic=True)
    def loss(rows: torch.Tensor) -> torch.Tensor:
        return model(rows).sum()

    return lambda: loss(torch.ones(2, 8, device=device)).backward()


def in_place_loop(model: nn.Module, device: torch.device) -> Callable[[], None]:
    model.compile()
    return plain_loop(model, device)


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
def test_every_prediction_names_the_versions_that_it_is_of(gpu: str, tmp_path: Path) -> None:
    loop = fitune.predict_loop(build, plain_loop, gpu=gpu)
    run = fitune.predict(write_config(tmp_path), gpu=gpu)
    for prediction in (loop, run):
        assert len([line for line in prediction.assumptions if line.startswith(VERSIONS)]) == 1
        assert COMPILED not in prediction.assumptions


def test_a_plan_shows_the_versions_in_its_table_and_in_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(write_config(tmp_path)))
    arguments = [
        "plan",
        str(tmp_path / "sft.yaml"),
        "--gpu",
        "RTX 4090",
        "batch.micro=1",
        "loss=full",
    ]
    assert main(arguments) == 0
    assert VERSIONS in capsys.readouterr().out
    assert main([*arguments, "--format", "json"]) == 0
    assert [
        line
        for line in json.loads(capsys.readouterr().out)["assumptions"]
        if line.startswith(VERSIONS)
    ]


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
@pytest.mark.parametrize("loop", [compiled_loop, decorated_loop, in_place_loop])
def test_a_loop_that_compiles_has_an_upper_bound_that_is_named(loop: Any, gpu: str) -> None:
    compiled, plain = (fitune.predict_loop(build, each, gpu=gpu) for each in (loop, plain_loop))
    assert COMPILED in compiled.assumptions
    assert compiled.peak_allocated_bytes == plain.peak_allocated_bytes


def test_a_model_that_is_compiled_when_it_is_built_is_one_too() -> None:
    def build_compiled() -> nn.Module:
        model = nn.Sequential(build())
        model[0].compile()
        return model

    assert COMPILED in fitune.predict_loop(build_compiled, plain_loop, gpu="cpu").assumptions


def too_large(loop: Any) -> Prediction:
    def wide(model: nn.Module, device: torch.device) -> Callable[[], None]:
        step = loop(model, device)

        def steps() -> None:
            held = torch.empty(2**35, dtype=torch.uint8, device=device)
            step()
            del held

        return steps

    return fitune.predict_loop(build, wide, gpu="RTX 4090")


def test_an_upper_bound_never_says_that_it_does_not_fit() -> None:
    assert too_large(plain_loop).fits is False
    bound = too_large(compiled_loop)
    assert bound.fits is None
    assert bound.first_oom is None
    assert fitune.predict_loop(build, compiled_loop, gpu="RTX 4090").fits is True


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plan_of_compiled_layers_refuses_none_for_its_memory(
    compiled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(write_config(tmp_path, compiled=compiled)))
    arguments = [
        "plan",
        str(tmp_path / "sft.yaml"),
        "--gpu",
        "RTX 4090",
        "--budget",
        "1MiB",
        "batch.micro=1",
    ]
    assert main([*arguments, "loss=full"]) == (0 if compiled else 3)
    shown = capsys.readouterr()
    assert (COMPILED in shown.out) is compiled
    assert ("perhaps, at most +" in shown.out) is compiled
    assert ("no plan fits" in shown.err) is not compiled


def test_a_run_of_compiled_layers_begins_where_the_bound_exceeds_the_budget(tmp_path: Path) -> None:
    tree = write_config(tmp_path, compiled=True) | {"memory": {"gpu": "RTX 4090", "budget": "1MiB"}}
    from fitune.config import read_config

    config = read_config(tree).config
    plan = choose_plan(config, search="fastest")
    assert plan.chosen is not None
    assert plan.candidates[plan.chosen].fits is None
    assert (
        plan.candidates[plan.chosen].predicted_device_bytes == closest(plan).predicted_device_bytes
    )
    assert "an upper bound" in plan.candidates[plan.chosen].reason
    _, note = follow(plan, config)
    assert note.endswith("an upper bound: it may run out of memory")


def test_a_plan_says_which_weights_qlora_leaves_as_they_are(tmp_path: Path) -> None:
    TINY_DBRX.save_pretrained(tmp_path)
    (note,) = model_notes(ModelConfig(source=str(tmp_path), method="qlora"))
    assert note.startswith("qlora: ")
    assert "of the parameters and stay in" in note
    assert not list(model_notes(ModelConfig(source=str(tmp_path), method="lora")))
    tree = {
        "model": {"source": str(tmp_path), "method": "qlora"},
        "data": {"train": "x", "max_length": 32},
    }
    assert note in fitune.predict(tree | {"batch": {"effective": 1}}, gpu="RTX 4090").assumptions


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    """gpt-oss as it is published: experts in mxfp4, the rest in bfloat16."""
    directory = tmp_path / "gpt-oss"
    model = build_model(copy.deepcopy(MXFP4_CONFIG), dtype=torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width_in, width_out = tensors.pop(name).shape
        shape = (experts, width_out, width_in // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
    MXFP4_CONFIG.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(directory)
    return directory


def test_weights_in_mxfp4_are_held_as_numbers_and_that_is_said(mxfp4: Path) -> None:
    source = ModelConfig(source=str(mxfp4), precision="bfloat16")
    (note,) = model_notes(source)
    assert note.startswith("weights stored as mxfp4")
    planned, loaded = (load_model(source, torch.device(device)) for device in ("meta", "cpu"))
    kinds = [
        {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        for model in (planned, loaded)
    ]
    assert kinds[0] == kinds[1]


def test_a_model_that_came_in_mxfp4_is_saved_as_an_ordinary_one(
    mxfp4: Path, tmp_path: Path
) -> None:
    source = ModelConfig(source=str(mxfp4), precision="bfloat16")
    model = load_model(source, torch.device("cpu"))
    save_model(model, tmp_path / "saved", tokenizer=load_tokenizer(source))
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    assert not [
        name for name in load_file(tmp_path / "saved" / "model.safetensors") if "blocks" in name
    ]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = plain.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert type(plain) is type(model)


def test_weights_in_fp8_are_unpacked_and_that_is_said(tmp_path: Path) -> None:
    config = copy.deepcopy(TINY_LLAMA)
    tensors = {}
    for name, tensor in build_model(config, dtype=torch.bfloat16).state_dict().items():
        tensors[name] = tensor.clone()
        if name.endswith("proj.weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full(
                [-(-size // 128) for size in tensor.shape], 2.0
            )
    config.save_pretrained(tmp_path)
    stored = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    content = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ModelConfig(source=str(tmp_path), precision="bfloat16")
    (note,) = model_notes(source)
    assert note.startswith("weights stored as fp8")
    planned, loaded = (load_model(source, torch.device(device)) for device in ("meta", "cpu"))
    kinds = [
        {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        for model in (planned, loaded)
    ]
    assert kinds[0] == kinds[1]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name].float(), tensors[name].float() * 2)


@pytest.mark.parametrize(
    "stored", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"load_in_8bit": True}]
)
def test_weights_in_a_format_that_is_not_trained_are_refused_by_plan_and_run(
    stored: dict[str, Any], tmp_path: Path
) -> None:
    TINY_LLAMA.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for device in ("meta", "cpu"):
        with pytest.raises(
            ModelError,
            match=r"are stored as \w+, which fitune neither trains nor unpacks: give the",
        ):
            load_model(ModelConfig(source=str(tmp_path)), torch.device(device))
    assert load_model(ModelConfig(source=str(tmp_path), init="random"), torch.device("meta"))


def test_a_number_of_layers_that_nobody_builds_is_refused(tmp_path: Path) -> None:
    TINY_LLAMA.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {
        "num_hidden_layers": 10**9,
        "layer_types": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match="says that it has 1,000,000,000 layers, and at most 10,000 are built"
    ):
        load_model(ModelConfig(source=str(tmp_path)), torch.device("meta"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vocab_size", 10**13),
        ("vocab_size", 0),
        ("hidden_size", 10**9),
        ("head_dim", 0),
        ("intermediate_size", -1),
        ("num_hidden_layers", -1),
    ],
)
def test_a_size_that_nobody_builds_is_refused(name: str, size: int, tmp_path: Path) -> None:
    TINY_LLAMA.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {name: size}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"says {name}: {size:,}, and from \d to 10,000,000 is"):
        load_model(ModelConfig(source=str(tmp_path)), torch.device("meta"))


def test_a_micro_batch_that_fills_the_memory_of_the_prediction_is_refused(tmp_path: Path) -> None:
    TINY_LLAMA.save_pretrained(tmp_path)
    config = {"model": {"source": str(tmp_path)}, "data": {"train": "none"}}
    rows = ["batch.effective=1000000", "batch.micro=1000000"]
    with pytest.raises(UsageError, match="tokens in one or two micro-batches are more than is"):
        fitune.predict(config, gpu="RTX 4090", overrides=rows)


@pytest.mark.parametrize("share", [-0.5, 1.0, 2.0])
def test_a_dropout_that_is_no_share_is_refused(share: float, tmp_path: Path) -> None:
    TINY_LLAMA.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"attention_dropout": share}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"says attention_dropout: {share:g}, and a dropout is"):
        load_model(ModelConfig(source=str(tmp_path)), torch.device("meta"))
