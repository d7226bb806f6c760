"""model/save.py and lora.py: what is written is complete, loads back elsewhere, and leaves the model as it was."""

import copy
import errno
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.config import LoraConfig, ModelConfig, ShapeConfig
from fitune.errors import ModelError
from fitune.model import save
from fitune.model.load import build_model, count_parameters, load_model
from fitune.model.lora import adaptable_names, apply_lora, load_adapters, not_adapted
from fitune.model.save import (
    export_minimind,
    plain_tensors,
    recover_directory,
    replaced_directory,
    save_model,
)
from tiny_models import TINY, TINY_LLAMA, TINY_MOE, TINY_QWEN3, save_tokenizer

IDS = torch.arange(3, 20)[None]
FAMILIES = [TINY_LLAMA, TINY_QWEN3, TINY_MOE]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def build(config: PretrainedConfig = TINY_QWEN3) -> PreTrainedModel:
    return build_model(copy.deepcopy(config), seed=1).eval()


def adapted(config: PretrainedConfig = TINY_QWEN3, lora: LoraConfig | None = None) -> PeftModel:
    """With adapters that do something."""
    model = apply_lora(build(config), lora or LoraConfig()).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("name", TINY)
def test_a_saved_model_loads_with_plain_transformers(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = build(TINY[name])
    save_model(model, tmp_path / "best", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    for (key, ours), theirs in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key


def test_a_model_that_knows_no_end_gets_that_of_its_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = build(type(TINY_LLAMA)(**(TINY_LLAMA.to_dict() | {"eos_token_id": None})))
    save_model(model, tmp_path / "best", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_saved_model_stops_at_what_it_has_learned_to_end_with_too(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    known = tokenizer.eos_token_id
    for ends, expected in (
        (["w1"], [known, *tokenizer.encode("w1")]),
        (["<|im_end|>"], known),
        ([], known),
    ):
        save_model(build_known(known), tmp_path / "best", tokenizer=tokenizer, ends=ends)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
        assert loaded.generation_config.eos_token_id == expected


def build_known(eos_token_id: int | None) -> PreTrainedModel:
    return build(type(TINY_LLAMA)(**(TINY_LLAMA.to_dict() | {"eos_token_id": eos_token_id})))


def test_the_tokenizer_and_its_template_come_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(build(), tmp_path / "best", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "best")
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


def test_weights_in_sixteen_bits_stay_in_sixteen_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(
        build_model(copy.deepcopy(TINY_QWEN3), dtype=torch.bfloat16),
        tmp_path / "best",
        tokenizer=tokenizer,
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "best").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt2", "gemma2"])
def test_merged_adapters_compute_what_they_computed_beside(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = adapted(TINY[name])
    save_model(model, tmp_path / "best", tokenizer=tokenizer, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best").eval()
    assert not torch.allclose(build(TINY[name])(IDS).logits, model(IDS).logits, atol=1e-3)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


VARIANTS = {
    "rslora": LoraConfig(rank=4, rslora=True),
    "dora": LoraConfig(rank=4, dora=True),
    "pissa": LoraConfig(rank=4, init="pissa"),
    "dora of pissa, rslora": LoraConfig(rank=4, init="pissa_niter_16", dora=True, rslora=True),
    "olora": LoraConfig(rank=4, init="olora"),
    "orthogonal": LoraConfig(rank=4, init="orthogonal"),
}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [*((name, "qwen3") for name in VARIANTS), ("dora", "gpt2"), ("pissa", "gpt2")],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_a_variant_of_lora_starts_as_the_model_and_is_saved_for_peft_and_merged(
    name: str, architecture: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """PiSSA and OLoRA are saved as LoRA of twice the rank, for the model in the files."""
    model = apply_lora(build(TINY[architecture]), VARIANTS[name]).eval()
    base = build(TINY[architecture])
    assert torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-4)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = model(IDS).logits
    assert not torch.allclose(expected, base(IDS).logits, atol=1e-3)
    save_model(model, tmp_path / "adapters", tokenizer=tokenizer)
    save_model(model, tmp_path / "merged", tokenizer=tokenizer, merge=True)
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapters")).eval()
    by_fitune = load_adapters(build(TINY[architecture]), tmp_path / "adapters").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for loaded in (by_peft, by_fitune, merged):
        assert torch.allclose(loaded(IDS).logits, expected, atol=2e-4, rtol=1e-3)


def test_merging_leaves_the_model_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "best", tokenizer=tokenizer, merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_adapters_alone_are_saved_and_go_on_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = adapted()
    save_model(model, tmp_path / "best", tokenizer=tokenizer)
    assert not list((tmp_path / "best").glob("model*"))
    again = load_adapters(build(), tmp_path / "best")
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-6)
    assert count_parameters(again) == count_parameters(model)


def test_adapters_of_another_model_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(adapted(), tmp_path / "best", tokenizer=tokenizer)
    other = build_model(type(TINY_LLAMA)(**(TINY_LLAMA.to_dict() | {"hidden_size": 64})))
    with pytest.raises(ModelError, match="cannot be loaded into this model"):
        load_adapters(other, tmp_path / "best")


def test_adapters_are_float32_beside_a_sixteen_bit_model() -> None:
    model = apply_lora(build_model(copy.deepcopy(TINY_QWEN3), dtype=torch.bfloat16), LoraConfig())
    trainable = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert (trainable, frozen) == ({torch.float32}, {torch.bfloat16})


def test_fresh_adapters_change_nothing_and_follow_the_seed() -> None:
    first, again, other = (
        apply_lora(build(), LoraConfig(), seed=seed).eval() for seed in (3, 3, 4)
    )
    assert torch.equal(first(IDS).logits, build()(IDS).logits)
    weights = [
        torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_all_linear_layers_but_the_head_are_adapted() -> None:
    assert adaptable_names(build()) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_an_unknown_target_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        ModelError, match=r"names query, which .* choose from down_proj, .*, v_proj, or all-linear"
    ):
        apply_lora(build(), LoraConfig(targets=("q_proj", "query")))


def test_only_the_named_targets_are_adapted() -> None:
    model = apply_lora(build(), LoraConfig(targets=("q_proj",)))
    assert all(
        ".q_proj." in name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def test_fused_experts_are_said_to_stay_frozen() -> None:
    assert not_adapted(build()) is None
    assert "experts.down_proj, experts.gate_up_proj, gate.weight hold" in str(
        not_adapted(build(TINY_MOE))
    )


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_an_exported_pth_in_its_own_type_gives_the_same_bits(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    model = build(config)
    export_minimind(model, tmp_path / "out" / "sft.pth", dtype=None)
    source = ModelConfig(source=str(tmp_path / "out" / "sft.pth"), shape=ShapeConfig(num_heads=4))
    loaded = load_model(source, torch.device("cpu"))
    for (name, ours), theirs in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_an_exported_pth_is_float16_under_the_names_of_minimind(tmp_path: Path) -> None:
    export_minimind(build(TINY_MOE), tmp_path / "sft.pth")
    tensors = torch.load(tmp_path / "sft.pth", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (48, 32)
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (4, 32)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()


def test_an_exported_pth_holds_merged_adapters(tmp_path: Path) -> None:
    model = adapted()
    export_minimind(model, tmp_path / "sft.pth", dtype=None)
    loaded = load_model(ModelConfig(source=str(tmp_path / "sft.pth")), torch.device("cpu")).eval()
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "qwen2"])
def test_other_architectures_are_not_written_as_minimind(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"another architecture\. Use --to hf"):
        export_minimind(build(TINY[name]), tmp_path / "sft.pth")


def test_scaled_positions_are_not_written_as_minimind(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    config = type(TINY_LLAMA)(**(TINY_LLAMA.to_dict() | {"rope_parameters": rope}))
    with pytest.raises(ModelError, match="positions are scaled"):
        export_minimind(build(config), tmp_path / "sft.pth")


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = build()
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds values beyond"):
        export_minimind(model, tmp_path / "sft.pth")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_earlier_model(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(build(), tmp_path / "best", tokenizer=tokenizer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "best").iterdir()}

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "_flush", full)
    with pytest.raises(ModelError, match="No space left on device"):
        save_model(build(TINY_LLAMA), tmp_path / "best", tokenizer=tokenizer)
    assert {file.name: file.read_bytes() for file in (tmp_path / "best").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "tokenizer"]


def test_a_new_model_replaces_the_earlier_one_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(build(), tmp_path / "best", tokenizer=tokenizer)
    (tmp_path / "best" / "leftover.safetensors").touch()
    save_model(build(TINY_LLAMA), tmp_path / "best", tokenizer=tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "best").config.model_type == "llama"
    assert not (tmp_path / "best" / "leftover.safetensors").exists()


def test_a_crash_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "config.json").write_text("{}")
    recover_directory(tmp_path / "best")
    assert (tmp_path / "best" / "config.json").exists()


def test_a_crash_after_the_renames_is_no_matter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "config.json").write_text("{}")
    for _ in range(2):
        save_model(build(), tmp_path / "best", tokenizer=tokenizer)
    assert not (tmp_path / ".best.old").exists()


def test_a_directory_with_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ModelError, match="is no model directory"), replaced_directory(tmp_path):
        pytest.fail("the block must not run")
    assert (tmp_path / "thesis.tex").exists()


def test_plain_tensors_of_a_model_without_adapters_are_its_own() -> None:
    model = build()
    assert plain_tensors(model)["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()
