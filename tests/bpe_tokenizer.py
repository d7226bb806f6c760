"""A byte-level BPE tokenizer with merges, which a test trains in a moment, as llama.cpp reads such."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import CHATML

VOCABULARY = 300
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bpe_tokenizer(
    pre_tokenizer: Any = None, *, template: str | None = CHATML, normalizer: Any = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of VOCABULARY tokens, SPECIAL first, by default with the pre-tokenizer of GPT-2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "what is the answer to this question? it is in the text " * 5
    backend.train_from_iterator([words + " ".join(f"w{n}" for n in range(50))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def save_bpe_tokenizer(directory: Path, *, template: str | None = CHATML) -> None:
    bpe_tokenizer(template=template).save_pretrained(directory)
