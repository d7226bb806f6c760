"""Frozen weights in 4 bits: what they take, and that they train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from fitune.config import ModelConfig, RunConfig, read_config
from fitune.errors import ModelError
from fitune.model.experts import EXPERTS
from fitune.model.load import count_parameters, load_model
from fitune.model.quantise import NF4Linear, not_quantised, quantise
from fitune.model.save import plain_tensors
from fitune.recorder.events import MemoryEvent
from fitune.trace.own_step import Pass, longest_rows, record_step
from tiny_models import TINY, TINY_DBRX, TINY_JETMOE

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    TINY["llama"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def model_config(directory: Path, method: str) -> ModelConfig:
    return ModelConfig(source=str(directory), init="random", precision="float32", method=method)


def test_a_weight_takes_half_a_byte_an_element_and_its_scales() -> None:
    with torch.device("meta"):
        layer = NF4Linear(nn.Linear(4096, 1024, bias=False))
    sizes = {
        name: tensor.numel() * tensor.element_size() for name, tensor in layer.state_dict().items()
    }
    n = 4096 * 1024
    assert sizes == {
        "weight": n // 2, "scales": n // 64, "outer_scales": n // 64 // 256 * 4,
        "offset": 4, "codes": 64, "scale_codes": 1024,
    }  # fmt: skip


def test_a_model_counts_its_weights_not_its_bytes(directory: Path) -> None:
    meta = torch.device("meta")
    counts = {
        method: count_parameters(load_model(model_config(directory, method), meta))
        for method in ("lora", "qlora")
    }
    assert counts["qlora"] == counts["lora"]


def test_a_model_without_linear_layers_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ModelError, match="use lora"):
        quantise(AutoModelForCausalLM.from_config(TINY["gpt2"]))


def test_the_packed_weight_is_near_the_weight() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    unpacked = NF4Linear(linear).unpacked(torch.float32)
    error = (unpacked - linear.weight).abs().mean() / linear.weight.abs().mean()
    assert 0.01 < error < 0.15  # sixteen values for a weight


def test_the_gradient_is_that_of_a_layer_with_the_unpacked_weight() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    packed = NF4Linear(nn.Linear(128, 64))
    plain = nn.Linear(128, 64)
    plain.weight.data, plain.bias.data = packed.unpacked(torch.float32), packed.bias.data
    results = []
    for layer in (packed, plain):
        x = torch.linspace(-1, 1, 5 * 128).view(5, 128).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append((out, x.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_only_the_adapters_of_a_packed_model_are_trained(directory: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(model_config(directory, "qlora"), CPU)
    model(input_ids=torch.arange(8)[None]).logits.square().sum().backward()
    with_gradient = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_merging_unpacks_the_weights(directory: Path) -> None:
    pytest.importorskip("bitsandbytes")
    merged = plain_tensors(load_model(model_config(directory, "qlora"), CPU))
    plain = load_model(model_config(directory, "full"), CPU).state_dict()
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: t.shape for name, t in plain.items()
    }
    weight = "model.layers.0.mlp.up_proj.weight"
    assert (merged[weight] - plain[weight]).abs().mean() < 0.25 * plain[weight].abs().mean()


def make_run(directory: Path, *overrides: str) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"source": str(directory), "init": "random", "precision": "float32"},
        "data": {"train": "rows.jsonl", "max_length": 24},
        "batch": {"micro": 2, "accumulation": 2},
    }
    return read_config(tree, overrides).config


def steps(events: Any) -> list[tuple[object, ...]]:
    """Births of the steps. The library's operators have other names than the arithmetic that stands for them; its code
    tables of 1,024 bytes are made before the recording."""

    def fact(e: MemoryEvent) -> tuple[object, ...]:
        return e.num_bytes, e.category, e.phase, e.step, e.micro_batch, e.module

    return [
        fact(e)
        for e in events
        if e.step > 0 and e.num_bytes > 0 and (e.num_bytes, e.category) != (1024, "optimizer_state")
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.method=qlora",),
        ("model.method=qlora", "model.recompute=full", "model.precision=bfloat16"),
        ("optim.name=adamw_8bit",),
    ],
    ids=" ".join,
)
def test_the_arithmetic_allocates_what_the_library_does(
    directory: Path, overrides: tuple[str, ...]
) -> None:
    pytest.importorskip("bitsandbytes")
    wide = TINY["llama"].__class__(
        **(TINY["llama"].to_dict() | {"vocab_size": 512})
    )  # an embedding in 8 bits
    wide.save_pretrained(directory)
    config = make_run(directory, *overrides)
    rows = longest_rows(config.data.max_length, num_rows=4)
    passes = [Pass("train", rows), Pass("train", rows)]
    fake = record_step(config, passes, target=None)
    real = record_step(config, passes, target=None, mode="real")
    assert len(steps(real.trace.events)) > 300
    assert steps(fake.trace.events) == steps(real.trace.events)


MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    TINY[request.param].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_experts_of_a_mixture_are_in_4_bits_too(mixture: Path) -> None:
    meta = torch.device("meta")
    quantised, plain = (
        load_model(model_config(mixture, method), meta) for method in ("qlora", "lora")
    )
    assert count_parameters(quantised)[0] == count_parameters(plain)[0]
    wide = {
        name
        for name, parameter in quantised.named_parameters()
        if "experts" in name and parameter.dim() == 3
    }
    assert not wide
    packed = [
        p
        for name, p in quantised.named_parameters()
        if "experts" in name and p.dtype == torch.uint8
    ]
    assert len(packed) == 2 * 2
    assert not_quantised(quantised) is None


def test_experts_in_4_bits_compute_what_their_unpacked_weights_compute(mixture: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = load_model(model_config(mixture, "qlora"), CPU).get_base_model()
    plain = load_model(model_config(mixture, "full"), CPU)
    plain.load_state_dict(plain_tensors(load_model(model_config(mixture, "qlora"), CPU)))
    ids = torch.arange(3, 30)[None]
    gradients = []
    for model in (quantised, plain):
        rows = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=rows).logits
        logits.square().sum().backward()
        gradients.append((logits.detach(), rows.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_unpacked_experts_are_not_kept_for_the_backward(mixture: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(model_config(mixture, "qlora"), CPU)
    (experts, *_) = (part for part in model.modules() if hasattr(part, "_is_expert_parallel"))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.shape) or saved, lambda saved: saved
    ):
        hidden = torch.randn(5, 32, requires_grad=True)
        experts(hidden, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)).sum().backward()
    assert kept
    assert not [shape for shape in kept if len(shape) == 3]


def test_experts_in_4_bits_multiply_in_the_format_of_autocast(mixture: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(model_config(mixture, "qlora"), CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(torch.arange(3, 30)[None]).logits
    rounded.float().sum().backward()
    exact = model(torch.arange(3, 30)[None]).logits
    assert 0 < (rounded - exact).abs().max() < 0.3 * exact.abs().max()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_arithmetic_of_experts_allocates_what_the_library_does(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    TINY[name].save_pretrained(tmp_path / "model")
    config = make_run(tmp_path / "model", "model.method=qlora")
    rows = longest_rows(config.data.max_length, num_rows=4)
    fake, real = (
        record_step(config, [Pass("train", rows)], target=None, mode=mode)
        for mode in ("fake", "real")
    )
    sizes = [
        sum(size for size, category, *_ in steps(each.trace.events) if category == "temporary")
        for each in (fake, real)
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.1


def test_mixtral_in_4_bits_takes_a_quarter_of_what_it_takes_in_16() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            MixtralConfig(), experts_implementation=EXPERTS, dtype=torch.bfloat16
        )
    before = sum(parameter.nbytes for parameter in model.parameters())
    quantise(model)
    after = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert before == 93_405_585_408
    assert after == 24_483_747_072


@pytest.mark.parametrize("config", [TINY_DBRX, TINY_JETMOE], ids=["dbrx", "jetmoe"])
def test_experts_with_code_of_their_own_stay_and_are_told(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    clause = not_quantised(load_model(model_config(tmp_path, "qlora"), torch.device("meta")))
    assert clause is not None
    assert "of the parameters and stay in float32" in clause


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_nothing_is_told_where_everything_is_packed(name: str, tmp_path: Path) -> None:
    TINY[name].save_pretrained(tmp_path)
    assert not_quantised(load_model(model_config(tmp_path, "qlora"), torch.device("meta"))) is None
