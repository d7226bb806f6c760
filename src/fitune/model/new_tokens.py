"""Add tokens to a model's vocabulary, and rows for them to its embedding and its head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.errors import ModelError

#: A grown vocabulary is a multiple of it, for tensor cores; LLaMA-Factory takes the same number.
_MULTIPLE = 64
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The ids of new tokens, and the size of the vocabulary that has room for them."""

    ids: tuple[int, ...] = ()
    vocab_size: int = 0


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], *, source: str) -> None:
    """Add `tokens` to a tokenizer, in place.

    Raises ModelError if one of them is in its vocabulary already.
    """
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise ModelError(
            f"model.new_tokens names {known[0]}, which the tokenizer of {source} has already: take "
            "it out of the list"
        )
    tokenizer.add_tokens(list(tokens))


def new_tokens(tokenizer: Tokenizer, tokens: Sequence[str], config: PretrainedConfig) -> NewTokens:
    """Return what the tokens mean for the model of `config`, which does not have them yet.

    Embeddings often have more rows than the tokenizer has tokens; these are used first.
    """
    ids = tuple(cast(list[int], tokenizer.convert_tokens_to_ids(list(tokens))))
    vocab_size: int = config.get_text_config().vocab_size
    if max(ids) >= vocab_size:
        vocab_size = -(-(max(ids) + 1) // _MULTIPLE) * _MULTIPLE
    return NewTokens(ids, vocab_size)


@torch.no_grad()
def grow(model: PreTrainedModel, new: NewTokens) -> None:
    """Give the embedding and the head of a model in the host's memory rows for new tokens.

    A new row is the mean of the rows of the other tokens, as in transformers' `mean_resizing`, but
    without its noise of a billionth of their covariance.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    if new.vocab_size > old_size:
        model.resize_token_embeddings(new.vocab_size, mean_resizing=False)
    rows = sorted({*new.ids, *range(old_size, new.vocab_size)})
    for weight in _tables(model):
        known = weight[: rows[0]]
        # In float64, so that the result does not depend on the number of threads.
        total = sum(part.double().sum(0) for part in known.split(_ROWS_AT_ONCE))
        weight[rows] = (total / len(known)).to(weight.dtype)


def _tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights of embedding and head, tied ones once."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(m.weight): m.weight for m in modules if m is not None}.values())
