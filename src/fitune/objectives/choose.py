"""Choose the objective of a run from its configuration."""

from dataclasses import fields

import torch
from torch import nn

from fitune.config import RunConfig
from fitune.objectives.logits import SupervisedTokens, choose_tokens
from fitune.objectives.objective import Objective
from fitune.objectives.preference import Preference
from fitune.objectives.supervised import Supervised


def choose_objective(
    model: nn.Module, config: RunConfig, *, device: torch.device
) -> tuple[Objective, str | None]:
    """Return the configured objective for a model, and a note for the user.

    Raises ModelError if the model does not allow loss=chunked.
    """
    tokens, note = choose_tokens(model, loss=config.loss, device=device)
    return unbound_objective(config, tokens), note


def unbound_objective(config: RunConfig, tokens: SupervisedTokens | None = None) -> Objective:
    """Return the configured objective.

    tokens: where it gets the logits of a model; None to make up samples alone.
    """
    tokens = tokens or SupervisedTokens()
    logits = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    if config.objective == "sft":
        return Supervised(**logits, label_smoothing=config.train.label_smoothing)
    return Preference(**logits, name=config.objective, settings=config.preference)
