"""Configure gradient checkpointing: which layers recompute their activations in the backward."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from fitune.config import Auto, Recompute
from fitune.errors import ModelError

_aten = torch.ops.aten
# Matrix products and attention are nearly all of a layer's arithmetic; the rest is cheap to repeat.
_EXPENSIVE: set[object] = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
#: The names of operators that exist only once their module is imported.
_EXPENSIVE_NAMES = {
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}
#: Selectively saved tensors stay on the GPU; PyTorch 2.14 warns that its default will change.
_HOOKS = (
    {"respect_saved_tensors_hooks": False}
    if "respect_saved_tensors_hooks" in signature(checkpoint).parameters
    else {}
)
_EXPERTS_NAMES = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
#: One layer in so many is recomputed.
_EVERY: dict[Recompute, int] = {"full": 1, "selective": 1, "every_2": 2, "every_4": 4}


def set_recompute(model: nn.Module, recompute: Recompute, *, offload: bool = False) -> None:
    """Select the layers that are recomputed in the backward.

    off: none. full: all. every_2, every_4: every second or fourth. selective: all, except their
        matrix products and attention. Gradients are the same in each case. It acts in training mode
        only, and may be called again.

    offload: save the inputs of recomputed layers, from which the recomputation starts, in pinned
        host memory.

    Raises ModelError if the model's layers cannot be recomputed.
    """
    layers = recomputable_layers(model)
    if recompute != "off" and not layers:
        raise ModelError(
            f"model.recompute={recompute} needs layers with gradient checkpointing in transformers: use off"
        )
    again = partial(cast(Callable[..., Any], checkpoint), use_reentrant=False, **_HOOKS)
    if recompute == "selective":
        # Experts with a bias add it to their product in place, so that product cannot be saved.
        experts = (
            set()
            if any(getattr(part, "has_bias", False) for part in model.modules())
            else _EXPERTS_NAMES
        )
        policy = partial(_policy, names=_EXPENSIVE_NAMES | experts)
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, policy))
    if offload:
        again = partial(_with_inputs_on_host, again)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = recompute != "off" and number % _EVERY[recompute] == 0
        layer._gradient_checkpointing_func = again


def recompute_period(recompute: Recompute | Auto) -> int:
    """Return the period with which recomputed and other layers alternate.

    auto counts as off, as long as nothing has been decided.
    """
    return 1 if recompute == "auto" else _EVERY.get(recompute, 1)


def recomputable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the model's repeated layers in order; none if its code does not mark them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _with_inputs_on_host(
    again: Callable[..., object], function: Callable[..., object], *args: object, **options: object
) -> object:
    """Run a checkpointed layer with its saved inputs on the host.

    Inside it, `again` has hooks of its own, so only what it saves itself is moved: no weight.
    """
    with save_on_cpu(pin_memory=True):
        return again(function, *args, **options)


def _policy(
    _: object, operator: object, *args: object, names: set[str], **options: object
) -> CheckpointPolicy:
    if (
        operator in _EXPENSIVE
        or str(operator).removesuffix(".default").replace(".", "::", 1) in names
    ):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
