"""Write a model, or its adapters alone, as a GGUF file, which llama.cpp and Ollama load.

The gguf package has the names of tensors in llama.cpp, the quantisations and the file format. Here
is what else llama.cpp expects: the numbers that describe an architecture, and the order in which it
wants the weights of query and key.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGUFWriter,
    Keys,
    LlamaFileType,
    RopeScalingType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf import GGMLQuantizationType as Quantisation
from gguf.quants import quantize
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fitune.errors import ModelError
from fitune.model.ends import add_ends, end_ids
from fitune.model.gguf_tokenizer import add_tokenizer
from fitune.model.ollama import modelfile
from fitune.model.peft_parts import PeftModel, get_peft_model_state_dict
from fitune.model.save import plain_tensors, replaced_directory

QuantisationName = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}
#: Of these, the embedding and the head are kept in 8 bits, because they suffer most and every
#: token of the answer depends on them.
_COARSE = {Quantisation.Q4_0, Quantisation.Q4_1, Quantisation.Q5_0, Quantisation.Q5_1}
_OUTER = ("token_embd.weight", "output.weight")
#: llama.cpp multiplies by these in float32 only.
_EXACT = ("ffn_gate_inp.weight", "rope_freqs.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """What a GGUF file says about where its model comes from."""

    name: str
    #: hub id of the base model, if it has one
    base: str | None = None
    license: str | None = None
    #: the tokens with which the model has learned to end
    ends: Sequence[str] = ()


def save_gguf(
    model: PreTrainedModel | PeftModel,
    directory: Path,
    *,
    tokenizer: Tokenizer,
    quantisation: QuantisationName,
    facts: GgufFacts,
    card: str,
) -> None:
    """Write a directory with the GGUF file, a Modelfile for Ollama and a README.md.

    quantisation, facts: as in `write_gguf`.
    card: the text of the README.md.

    Raises ModelError like `write_gguf`, and if the directory cannot be written.
    """
    name = f"{facts.name}-{quantisation}.gguf"
    add_ends(model, tokenizer, facts.ends)
    with replaced_directory(directory) as unfinished:
        write_gguf(
            model, unfinished / name, tokenizer=tokenizer, quantisation=quantisation, facts=facts
        )
        text = modelfile(name, tokenizer, end_ids=end_ids(model, tokenizer))
        (unfinished / "Modelfile").write_text(text, encoding="utf-8")
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def save_gguf_adapter(model: PeftModel, directory: Path, *, name: str, card: str) -> None:
    """Write a directory with the adapters as a GGUF file and a README.md.

    Raises ModelError like `write_gguf_adapter`, and if the directory cannot be written.
    """
    with replaced_directory(directory) as unfinished:
        write_gguf_adapter(model, unfinished / f"{name}-lora.gguf", name=name)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def write_gguf(
    model: PreTrainedModel | PeftModel,
    path: Path,
    *,
    tokenizer: Tokenizer,
    quantisation: QuantisationName,
    facts: GgufFacts,
) -> None:
    """Write the model with merged adapters, its tokenizer and its chat template.

    quantisation: of the matrices. Vectors stay float32, and so does a mixture's router; a matrix
        whose rows are no multiple of a block is float16; of 4 and 5 bits the embedding and the
        head have 8.

    Raises ModelError for what llama.cpp does not compute, and for values beyond float16.
    """
    config = model.config
    architecture = _checked_architecture(config)
    tensors = dict(_tensors(plain_tensors(model), config, architecture))
    wanted = Quantisation[quantisation.upper()]
    kinds = {name: _kind(name, tensor, wanted) for name, tensor in tensors.items()}
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_type("model")
    writer.add_name(facts.name)
    if facts.license is not None:
        writer.add_license(facts.license)
    if facts.base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, facts.base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{facts.base}")
    _add_shape(writer, config, architecture)
    prefix = "" if wanted == Quantisation.F32 else "MOSTLY_"
    writer.add_file_type(LlamaFileType[f"{prefix}{wanted.name}" if prefix else "ALL_F32"])
    writer.add_quantization_version(2)
    num_rows = model.get_input_embeddings().weight.shape[0]
    add_tokenizer(writer, tokenizer, num_rows=num_rows, end_ids=end_ids(model, tokenizer))
    _write(writer, tensors, kinds)


def write_gguf_adapter(model: PeftModel, path: Path, *, name: str) -> None:
    """Write the adapters alone, in float32, for use on a GGUF file of the base model.

    Raises ModelError for a base or for adapters that llama.cpp does not compute.
    """
    config = model.config
    architecture = _checked_architecture(config)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    adapter = model.peft_config[model.active_adapter]
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        layer, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        found = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if kind not in ("A.weight", "B.weight") or found is None:
            raise ModelError(
                f"llama.cpp has no place for {key} of an adapter: export the merged model, without "
                "--adapter"
            )
        if kind == "B.weight":
            tensor = _reordered(f"{layer}.weight", tensor, config, architecture)
        tensors[f"{found}.lora_{kind[0].lower()}"] = tensor
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    # llama.cpp divides it by the rank.
    scale = math.sqrt(adapter.r) if adapter.use_rslora else 1.0
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(adapter.lora_alpha * scale))
    _write(writer, tensors, dict.fromkeys(tensors, Quantisation.F32))


def _checked_architecture(config: PretrainedConfig) -> MODEL_ARCH:
    """Return llama.cpp's architecture. Raises ModelError if it computes something else."""
    kind = config.model_type
    reason = None
    if kind not in _ARCHITECTURES:
        reason = f"'{kind}' is none of {', '.join(_ARCHITECTURES)}"
    elif config.hidden_act != "silu":
        reason = f"its activation is {config.hidden_act}"
    elif getattr(config, "sliding_window", None) is not None:
        reason = "it has sliding windows"
    elif kind.startswith("qwen3") and config.attention_bias:
        reason = "its attention has biases"
    elif config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"):
        reason = f"its positions are scaled ({config.rope_parameters['rope_type']})"
    elif config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        reason = "only a part of each head is rotated"
    elif kind == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        reason = "some of its layers have experts and some have none"
    elif kind == "qwen3_moe" and not config.norm_topk_prob:
        reason = "the weights of its experts are not normalised"
    if reason is not None:
        raise ModelError(
            f"fitune cannot write this model as GGUF: {reason}; use --to hf, and convert that by "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return _ARCHITECTURES[kind]


def _add_shape(writer: GGUFWriter, config: PretrainedConfig, architecture: MODEL_ARCH) -> None:
    num_heads, head_dim = config.num_attention_heads, _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.num_key_value_heads or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if architecture == MODEL_ARCH.QWEN3MOE:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tensors(
    plain: Mapping[str, torch.Tensor], config: PretrainedConfig, architecture: MODEL_ARCH
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's name and order of each tensor; a tied head is left out."""
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in plain.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if key.endswith("experts.gate_up_proj"):  # [E, 2F, D], gate before up
            gate, up = tensor.chunk(2, dim=1)
            yield _name(names, key.replace("gate_up_proj", "gate_proj.weight")), gate
            yield _name(names, key.replace("gate_up_proj", "up_proj.weight")), up
        elif key.endswith("experts.down_proj"):
            yield _name(names, f"{key}.weight"), tensor
        else:
            yield _name(names, key), _reordered(key, tensor, config, architecture)
    if config.rope_parameters["rope_type"] == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -exponents / frequencies


def _name(names: TensorNameMap, key: str) -> str:
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ModelError(
            f"llama.cpp has no place for {key}: use --to hf, and convert that by its "
            "convert_hf_to_gguf.py"
        )
    return str(name)


def _reordered(
    key: str, tensor: torch.Tensor, config: PretrainedConfig, architecture: MODEL_ARCH
) -> torch.Tensor:
    """Return the rows of query and key in the order in which llama.cpp rotates them.

    Its Llama rotates neighbouring elements of a head, transformers the two halves of it; the other
    architectures agree.
    """
    layer = key.split(".")[-2]
    if architecture != MODEL_ARCH.LLAMA or layer not in ("q_proj", "k_proj"):
        return tensor
    num_heads = config.num_attention_heads
    if layer == "k_proj":
        num_heads = config.num_key_value_heads or num_heads
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _head_dim(config: PretrainedConfig) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _kind(name: str, tensor: torch.Tensor, wanted: Quantisation) -> Quantisation:
    if tensor.dim() < 2 or name.endswith(_EXACT):
        return Quantisation.F32
    kind = Quantisation.Q8_0 if wanted in _COARSE and name in _OUTER else wanted
    return Quantisation.F16 if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _write(
    writer: GGUFWriter, tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, Quantisation]
) -> None:
    """Write the file, converting one tensor at a time, so that no second copy of all is needed."""
    for name, tensor in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
        num_bytes = tensor.numel() // block * block_bytes
        shape: Sequence[int] = tuple(tensor.shape)
        # The dtype is that of `raw_dtype`; uint8 alone would make the writer read another shape.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        encoded = quantize(values, kinds[name])
        if kinds[name] == Quantisation.F16 and not np.isfinite(encoded).all():
            raise ModelError(f"{name} holds values beyond float16: use --quantise bf16 or f32")
        writer.write_tensor_data(encoded)
    writer.close()
