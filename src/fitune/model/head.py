"""Split a causal language model before its last matrix product.

A loss can then compute logits only for the tokens that need them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedModel

from fitune.errors import ModelError
from fitune.model.finite import weights_not_finite
from fitune.model.trained_whole import TrainedRows, merged_rows, trained_layer, trained_rows


@dataclass(frozen=True, slots=True)
class Head:
    """The decoder of a causal language model and what makes logits of its hidden states.

    decoder(input_ids=..., position_ids=..., use_cache=False, ...).last_hidden_state is the hidden
    state h, and

        logits = soft_cap * tanh(scale * (h @ weight.T + bias) / soft_cap)

    without the cap if soft_cap is None.
    """

    decoder: nn.Module
    #: Weight [V, D] and bias [V] or None are read from it when they are used, since a sharded
    #: model has the whole weight only while it computes.
    output: nn.Linear
    scale: float
    soft_cap: float | None
    #: the same weight as the output of an autograd function that joins its gradient with that
    #: of the embedding (model/tied_head.py), or with the rows of new tokens; used instead of
    #: `output.weight` if given
    joined_weight: torch.Tensor | None = None
    #: peft's layer with the trained rows of new tokens, if there are any
    rows: TrainedRows | None = None

    @property
    def weight(self) -> torch.Tensor:
        return self.output.weight if self.joined_weight is None else self.joined_weight

    def with_trained_rows(self) -> Self:
        """Return the head with the rows of new tokens as they are now, for one forward."""
        return self if self.rows is None else replace(self, joined_weight=merged_rows(self.rows))

    @property
    def bias(self) -> torch.Tensor | None:
        return self.output.bias

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return exactly the model's own logits, [..., D] -> [..., V].

        Tests compare every more economical loss with them.
        """
        weight = self.weight
        if not torch.is_autocast_enabled(hidden.device.type):
            # A head that is trained beside adapters is float32.
            hidden = hidden.to(weight.dtype)
        logits = nn.functional.linear(hidden, weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return (
            logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)
        )


def decoder_and_head(model: nn.Module) -> Head | str:
    """Return the parts of a causal language model, or why they are unknown, as one clause.

    Adapters stay in place. The parts are accepted only if they give the model's own logits for two
    tokens. If weights have no data (meta and fake tensors), the structure alone decides. Raises
    ModelError for weights that are not finite, with which nothing can be computed.
    """
    whole = cast(PreTrainedModel, getattr(model, "get_base_model", lambda: model)())
    decoder = getattr(whole, whole.base_model_prefix, None)
    wrapped = whole.get_output_embeddings()
    rows = trained_rows(wrapped)
    output = trained_layer(wrapped) if rows is None else rows.base_layer
    if not isinstance(decoder, nn.Module) or decoder is whole or type(output) is not nn.Linear:
        return f"{type(whole).__name__} has no plain linear head after a decoder"
    config = whole.config.get_text_config()
    soft_cap = getattr(config, "final_logit_softcapping", None)
    head = Head(decoder, output, _scale(config), soft_cap, rows=rows)
    if output.weight.is_meta or is_fake(output.weight) or _gives_the_logits(whole, head):
        return head
    if (name := weights_not_finite(whole)) is not None:
        raise ModelError(
            f"{name} of the model holds values that are not finite: the file is damaged or of a "
            "run that diverged; "
            "take weights from before that"
        )
    return f"{type(whole).__name__} computes its logits in a way that fitune does not know"


def _scale(config: object) -> float:
    """Return the factor of the logits: Cohere and Falcon-H1 multiply them, Granite divides them."""
    factor = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    return float(factor) / float(getattr(config, "logits_scaling", None) or 1.0)


def _gives_the_logits(whole: PreTrainedModel, head: Head) -> bool:
    expected = two_logits(whole)
    found = two_logits(
        whole,
        lambda tokens: head.with_trained_rows().logits(
            head.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        ),
    )
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 1e-2 * expected.abs().max()
    )


def two_logits(
    whole: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the logits of two tokens, [1, 2, V], in evaluation mode and without gradients.

    forward: called instead of the model's own forward.
    """
    tokens = torch.tensor([[1, 2]], device=next(whole.parameters()).device)
    was_training = whole.training
    whole.eval()
    try:
        with torch.no_grad():
            logits: torch.Tensor = (
                forward(tokens) if forward else whole(input_ids=tokens, use_cache=False).logits
            )
            return logits
    finally:
        whole.train(was_training)
