"""What is exported as GGUF is the same model: to the gguf package, to transformers and to llama.cpp's rules."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, Qwen2Config

from bpe_tokenizer import SPECIAL, VOCABULARY, bpe_tokenizer
from byte_tokenizer import CHATML, PLAIN_TURNS, byte_tokenizer
from fitune.config import LoraConfig
from fitune.errors import ModelError
from fitune.model.gguf_write import GgufFacts, write_gguf, write_gguf_adapter
from fitune.model.load import build_model, quiet_transformers
from fitune.model.lora import apply_lora
from fitune.model.new_tokens import grow, new_tokens
from fitune.model.ollama import find_parts, modelfile
from fitune.model.presets import llama_config, qwen3_config, qwen3_moe_config
from tiny_models import TINY_GPT2, save_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY + 4, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA = llama_config(**SHAPE, intermediate_size=96, attention_bias=True)
UNTIED = llama_config(**SHAPE, intermediate_size=96, tie_word_embeddings=False)
QWEN2 = Qwen2Config(**SHAPE, intermediate_size=96, bos_token_id=0, eos_token_id=2, pad_token_id=0)
#: transformers reads no other size of a head of this architecture
QWEN3 = qwen3_config(**(SHAPE | {"head_dim": 128}), intermediate_size=96)
MOE = qwen3_moe_config(**SHAPE, moe_intermediate_size=64, num_experts=4)
TEXT = "<|im_start|>user\nwhat is w12 in the text?<|im_end|>\n<|im_start|>assistant\n"


def write(model: Any, path: Path, quantisation: Any = "f32", tokenizer: Any = None) -> Path:
    tokenizer = tokenizer or bpe_tokenizer()
    facts = GgufFacts(name="tiny", base="org/base", license="mit")
    write_gguf(model, path, tokenizer=tokenizer, quantisation=quantisation, facts=facts)
    return path


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).fields.get(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize(
    ("config", "quantisation", "most"),
    [(LLAMA, "f32", 1e-6), (UNTIED, "q8_0", 0.1), (QWEN2, "f16", 0.004), (QWEN3, "bf16", 0.02)],
)
def test_transformers_computes_the_same_from_the_file(
    config: PretrainedConfig, quantisation: str, most: float, tmp_path: Path
) -> None:
    model, tokenizer = build_model(config).eval(), bpe_tokenizer()
    path = write(model, tmp_path / "tiny.gguf", quantisation)
    with quiet_transformers(), torch.no_grad():
        place = {"pretrained_model_name_or_path": tmp_path, "gguf_file": path.name}
        ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
        assert AutoTokenizer.from_pretrained(**place)(TEXT)["input_ids"] == ids[0].tolist()
        back = AutoModelForCausalLM.from_pretrained(**place).eval()
        ours, theirs = model(input_ids=ids).logits, back(input_ids=ids).logits
    assert (theirs - ours).std() / ours.std() < most  # what the rounding of the weights does


def test_a_mixture_has_its_experts_in_one_tensor_each(tmp_path: Path) -> None:
    """Transformers reads no width of an expert but its own default, so the tensors are looked at."""
    model = build_model(MOE)
    found = tensors_of(write(model, tmp_path / "moe.gguf"))
    experts = model.model.layers[1].mlp.experts
    gate_up = experts.gate_up_proj.detach().numpy()
    assert np.array_equal(found["blk.1.ffn_gate_exps.weight"], gate_up[:, :64])
    assert np.array_equal(found["blk.1.ffn_up_exps.weight"], gate_up[:, 64:])
    assert np.array_equal(found["blk.1.ffn_down_exps.weight"], experts.down_proj.detach().numpy())


def test_four_bits_leave_eight_to_the_embedding_and_sixteen_to_odd_rows(tmp_path: Path) -> None:
    config = llama_config(**SHAPE, intermediate_size=88)
    path = write(build_model(config), tmp_path / "tiny.gguf", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # 88 is no multiple of 32
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied


def test_adapters_alone_are_what_the_merged_file_has_on_top_of_the_base(tmp_path: Path) -> None:
    base = build_model(LLAMA)
    before = tensors_of(write(base, tmp_path / "base.gguf"))
    model = apply_lora(base, LoraConfig(rank=4, alpha=6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    after = tensors_of(write(model, tmp_path / "merged.gguf"))
    write_gguf_adapter(model, tmp_path / "lora.gguf", name="tiny")
    adapters = tensors_of(tmp_path / "lora.gguf")
    scale = field(tmp_path / "lora.gguf", "adapter.lora.alpha") / 4
    assert field(tmp_path / "lora.gguf", "general.type") == "adapter"
    changed = {name.removesuffix(".lora_a") for name in adapters if name.endswith(".lora_a")}
    assert changed == {name for name in after if not np.array_equal(before[name], after[name])}
    for name in changed:
        delta = adapters[f"{name}.lora_b"] @ adapters[f"{name}.lora_a"] * scale
        assert np.allclose(before[name] + delta, after[name], atol=1e-5), name


def test_new_tokens_and_their_trained_rows_are_in_the_file_of_a_merged_model(
    tmp_path: Path,
) -> None:
    base, tokenizer = build_model(UNTIED), bpe_tokenizer()
    new = [f"<new{number}>" for number in range(6)]
    tokenizer.add_tokens(new)
    grow(base, new_tokens(tokenizer, new, UNTIED))
    ids = tokenizer.convert_tokens_to_ids(new)
    model = apply_lora(base, LoraConfig(rank=4), new_ids=ids).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_(std=0.1)
    write(model, tmp_path / "tiny.gguf", tokenizer=tokenizer)
    with quiet_transformers(), torch.no_grad():
        place = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "tiny.gguf"}
        text = tokenizer("what is <new3>", return_tensors="pt")["input_ids"]
        assert ids[3] in text[0]
        assert (
            AutoTokenizer.from_pretrained(**place)("what is <new3>")["input_ids"]
            == text[0].tolist()
        )
        back = AutoModelForCausalLM.from_pretrained(**place).eval()
        assert torch.allclose(back(text).logits, model(text).logits, atol=1e-4)
    with pytest.raises(ModelError, match=r"has no place for .*: export the merged model"):
        write_gguf_adapter(model, tmp_path / "lora.gguf", name="tiny")


def test_the_file_has_the_vocabulary_and_what_ends_an_answer(tmp_path: Path) -> None:
    model, tokenizer = build_model(LLAMA), bpe_tokenizer()
    model.generation_config.eos_token_id = [2, 0]
    path = write(model, tmp_path / "tiny.gguf", tokenizer=tokenizer)
    keys = {
        key: field(path, f"tokenizer.ggml.{key}")
        for key in ("model", "pre", "bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")
    }
    assert keys == {
        "model": "gpt2", "pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 2, "eot_token_id": 0,
        "add_bos_token": False,
    }  # fmt: skip
    tokens, types = (field(path, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert tokens[:3] == SPECIAL
    assert tokens[-1] == f"[PAD{VOCABULARY + 3}]"
    assert [types[0], types[3], types[-1]] == [3, 1, 5]  # control, normal, unused
    assert field(path, "tokenizer.chat_template") == CHATML
    assert field(path, "general.license") == "mit"


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(numbers: str) -> Any:
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = Regex(SPLIT.replace("NUMBERS", numbers))
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bare])


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (split(""), "qwen2"),
        (split("{1,3}"), "llama-bpe"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            "smollm",
        ),
    ],
)
def test_llama_cpp_gets_its_own_name_for_how_text_is_split(
    pre_tokenizer: Any, name: str, tmp_path: Path
) -> None:
    path = write(build_model(LLAMA), tmp_path / "a.gguf", tokenizer=bpe_tokenizer(pre_tokenizer))
    assert field(path, "tokenizer.ggml.pre") == name


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    odd = {
        "a WordLevel model": AutoTokenizer.from_pretrained(tmp_path),
        "the normalizer Lowercase": bpe_tokenizer(normalizer=normalizers.Lowercase()),
        "the pre-tokenizer Whitespace": bpe_tokenizer(pre_tokenizers.Whitespace()),
    }
    for reason, tokenizer in odd.items():
        with pytest.raises(ModelError, match=f"the tokenizer has {reason}"):
            write(build_model(LLAMA), tmp_path / "tiny.gguf", tokenizer=tokenizer)


def test_a_model_that_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    odd = {
        "'gpt2' is none of": TINY_GPT2,
        r"its positions are scaled \(yarn\)": llama_config(
            **SHAPE, intermediate_size=96, rope_parameters=yarn
        ),
        "its activation is gelu": llama_config(**SHAPE, intermediate_size=96, hidden_act="gelu"),
    }
    for reason, config in odd.items():
        with pytest.raises(ModelError, match=reason):
            write(build_model(config), tmp_path / "tiny.gguf")


def test_a_modelfile_renders_turns_as_the_chat_template_does() -> None:
    text = modelfile("tiny.gguf", byte_tokenizer(CHATML), end_ids=[2, 0])
    assert text.splitlines()[0] == "FROM ./tiny.gguf"
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')
    parts = find_parts(byte_tokenizer(PLAIN_TURNS))
    assert parts is not None
    assert parts.go_template().startswith("<|endoftext|>{{ range .Messages }}")


def test_a_modelfile_has_the_system_message_that_a_template_writes_by_itself() -> None:
    by_default = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    )
    parts = find_parts(byte_tokenizer(by_default + CHATML))
    assert parts is not None
    assert parts.system == "Be kind."


def test_a_template_that_does_more_than_turns_is_left_to_ollama() -> None:
    counted = CHATML.replace("message.content", "loop.index ~ message.content")
    assert find_parts(byte_tokenizer(counted)) is None
    assert 'TEMPLATE "' not in modelfile("tiny.gguf", byte_tokenizer(counted), end_ids=[2])
