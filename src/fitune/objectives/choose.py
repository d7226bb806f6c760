"""Choose the objective of a run from its configuration."""

import copy
from dataclasses import fields

import torch
from torch import nn

from fitune.config import ReferenceKind, RunConfig
from fitune.model.head import decoder_and_head
from fitune.objectives.kto import KahnemanTversky
from fitune.objectives.log_probs import LiveReference
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
    reference = live_reference(model, config.reference, tokens)
    return unbound_objective(config, tokens, reference), note


def live_reference(
    model: nn.Module, kind: ReferenceKind | None, tokens: SupervisedTokens
) -> LiveReference | None:
    """Return what computes the reference in each step, None if nothing does.

    The copy is one of the present weights, so this is called before any training. It shares
    nothing with the model, and no optimizer and no checkpoint knows it.
    """
    if kind == "adapter_off":
        return LiveReference()
    if kind != "frozen_copy":
        return None
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    head = None if tokens.head is None else decoder_and_head(frozen)
    assert not isinstance(head, str), head
    return LiveReference(frozen, head)


def unbound_objective(
    config: RunConfig,
    tokens: SupervisedTokens | None = None,
    reference: LiveReference | None = None,
) -> Objective:
    """Return the configured objective.

    tokens: where it gets the logits of a model; None to make up samples alone.
    reference: what computes the reference in each step.
    """
    tokens = tokens or SupervisedTokens()
    logits = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    if config.objective == "sft":
        return Supervised(**logits, label_smoothing=config.train.label_smoothing)
    if config.objective == "kto":
        return KahnemanTversky(**logits, settings=config.preference, reference=reference)
    return Preference(
        **logits, settings=config.preference, reference=reference, name=config.objective
    )
