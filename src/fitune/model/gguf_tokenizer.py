"""Describe a tokenizer in a GGUF file, as llama.cpp reads it.

llama.cpp does not run a tokenizer's own pipeline. It has pipelines of its own, and the file names
one of them. A tokenizer whose pipeline it does not have would read every text in other tokens than
the model has learned, so it is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.errors import ModelError

Json = Mapping[str, object]
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#: How text is split before merges are applied -> llama.cpp's name of it. `bytes` is the regular
#: expression of GPT-2, which is the one of ByteLevel.
_PRE_TOKENIZERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (rf"{_SUFFIXES}|{_WORDS}|\p{{N}}|{_SIGNS}",): "qwen2",
    (rf"{_SUFFIXES}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}",): "llama-bpe",
}


def add_tokenizer(
    writer: GGUFWriter, tokenizer: Tokenizer, *, num_rows: int, end_ids: Sequence[int]
) -> None:
    """Add the vocabulary, merges, special tokens and the chat template.

    num_rows: rows of the model's embedding; those without a token become unused tokens.
    end_ids: the tokens at which a generation stops.

    Raises ModelError for a tokenizer that llama.cpp does not have.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    model = pipeline["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise _unknown(f"a {model['type']} model that is not a BPE of bytes with merges")
    pre_tokenizer = _pre_tokenizer(pipeline.get("normalizer"), pipeline.get("pre_tokenizer"))
    tokens, types = _vocabulary(tokenizer, num_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    _add_special_tokens(writer, tokenizer, end_ids)
    if (template := default_template(tokenizer)) is not None:
        writer.add_chat_template(template)


def default_template(tokenizer: Tokenizer) -> str | None:
    """Return the chat template; of several named ones the one called default."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer puts its first special token before a text by itself."""
    return tokenizer.bos_token_id in list(tokenizer("a")["input_ids"])[:1]


def _add_special_tokens(writer: GGUFWriter, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
    end = (
        tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(end_ids), None)
    )
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if end is not None:
        writer.add_eos_token_id(end)
    # llama.cpp also stops at the end of a turn, for which a file has one more place.
    for turn_end in [other for other in end_ids if other != end][:1]:
        writer.add_eot_token_id(turn_end)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(tokenizer.eos_token_id in list(tokenizer("a")["input_ids"])[-1:])
    writer.add_add_space_prefix(False)


def _vocabulary(tokenizer: Tokenizer, num_rows: int) -> tuple[list[str], list[TokenType]]:
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [names.get(index, f"[PAD{index}]") for index in range(num_rows)]
    types = [TokenType.NORMAL if index in names else TokenType.UNUSED for index in range(num_rows)]
    for index, token in added.items():
        if index < num_rows:
            types[index] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return tokens, types


def _pre_tokenizer(normalizer: Json | None, pre_tokenizer: Json | None) -> str:
    """Return llama.cpp's name for the pipeline. Raises ModelError if it has none."""
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(f"the normalizer {normalizer['type']}")
    steps = tuple(_steps(pre_tokenizer))
    if steps not in _PRE_TOKENIZERS:
        raise _unknown(f"the pre-tokenizer {' + '.join(steps) or 'none'}")
    return _PRE_TOKENIZERS[steps]


def _steps(pre_tokenizer: Json | None) -> Iterator[str]:
    match pre_tokenizer:
        case None:
            return
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            for part in parts:
                yield from _steps(part)
        case {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}:
            return  # it only renames bytes
        case {"type": "ByteLevel", "add_prefix_space": False}:
            yield "bytes"
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": text}}:
            yield text
        case other:
            yield str(other["type"])


def _unknown(part: str) -> ModelError:
    return ModelError(
        f"the tokenizer has {part}, for which fitune knows no name in llama.cpp: use --to hf, and "
        "convert that by llama.cpp's convert_hf_to_gguf.py"
    )
