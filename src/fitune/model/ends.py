"""Which tokens end what a model generates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

if TYPE_CHECKING:
    # The import takes half a second and is needed for adapters only.
    from peft import PeftModel


def end_ids(model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer) -> list[int]:
    """Return the tokens at which a generation of the model stops."""
    generation = model.generation_config
    ends = None if generation is None else generation.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def ids_of(ends: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of these tokens, without those that the tokenizer does not have."""
    found = (tokenizer.convert_tokens_to_ids(end) for end in ends)
    return [end for end in found if isinstance(end, int)]


def add_ends(
    model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer, ends: Sequence[str]
) -> None:
    """Let generations stop at these tokens too, besides those where they stopped before."""
    if model.generation_config is None:
        return
    known = dict.fromkeys([*end_ids(model, tokenizer), *ids_of(ends, tokenizer)])
    model.generation_config.eos_token_id = [*known] if len(known) > 1 else next(iter(known), None)
