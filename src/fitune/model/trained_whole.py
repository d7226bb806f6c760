"""Train whole layers, or the rows of new tokens, beside the adapters of a frozen model.

peft wraps such a layer: `modules_to_save` in a copy that is trained, `trainable_token_indices` in
one that puts trained rows into the frozen matrix. This module imports nothing of peft, which takes
half a second and is needed for adapters only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fitune.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel


def beside_adapters(
    model: PreTrainedModel, modules_to_save: Sequence[str], new_ids: Sequence[int]
) -> tuple[list[str], dict[str, list[int]]]:
    """Return the names of the layers that are trained whole, and {layer: rows that are trained}.

    A head with the embedding's weight is trained with it, whichever of the two is named. Raises
    ModelError for names that the model does not have, and for those of blocks of layers.
    """
    found = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    for name in modules_to_save:
        module = found.get(name)
        if module is None or any(True for _ in module.children()):
            what = "does not have" if module is None else "has as a block of layers"
            raise ModelError(
                f"model.lora.modules_to_save names {name}, which this model {what}: name single "
                "layers such as embed_tokens or lm_head"
            )
    tables = _table_names(model)
    is_whole = [name in modules_to_save for name in tables]
    if is_tied(model) and any(is_whole):
        whole = [tables[0], *(name for name in modules_to_save if name not in tables)]
        return whole, {}
    rows = {
        name: list(new_ids)
        for name in (tables[:1] if is_tied(model) else tables)
        if new_ids and name not in modules_to_save
    }
    head = model.get_output_embeddings()
    if tables[-1] in rows and getattr(head, "bias", None) is not None:
        raise ModelError(
            f"the head of this model has a bias, so the rows of new tokens cannot be trained alone: "
            f"name {tables[-1]} in model.lora.modules_to_save"
        )
    return list(dict.fromkeys(modules_to_save)), rows


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head has the embedding's weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def is_embedding(model: PreTrainedModel, name: str) -> bool:
    """Return whether this is the last name of the model's embedding."""
    return name == _table_names(model)[0]


def _table_names(model: PreTrainedModel) -> list[str]:
    """Return the last names of embedding and head, in this order."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(table)].rpartition(".")[2] for table in tables if table is not None]


def train_in_float32(adapted: "PeftModel") -> None:
    """Make the trained copies of layers float32, as adapters are, with results in the old dtype.

    In 16 bits most updates would be smaller than half the distance of two numbers.
    """
    for module in adapted.modules():
        copies = getattr(module, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict):
            continue
        # Not that of the copy, which a tied one may have made float32 already.
        frozen = cast(nn.Module, module.original_module)
        dtype = next(frozen.parameters()).dtype
        for copy in copies.values():
            if dtype != torch.float32:
                # It keeps tied copies one parameter.
                copy.float()
                compute_in_float32(module, dtype)


def compute_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module with float32 weights stand among those of `dtype`, by hooks."""
    module.register_forward_pre_hook(_input_as_weight)
    module.register_forward_hook(_ResultAsBefore(dtype))


def _input_as_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Cast the input of a float32 layer, as autocast does where it is at work."""
    first = args[0]
    if not first.is_floating_point() or torch.is_autocast_enabled(first.device.type):
        return None
    return (first.float(), *args[1:])


class _ResultAsBefore:
    """Casts the result of a layer, as a forward hook."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, module: nn.Module, args: object, result: Tensor) -> Tensor:
        return result.to(self._dtype)


def trained_layer(module: nn.Module | None) -> nn.Module | None:
    """Return the layer that computes in place of a wrapped one: the copy that is trained.

    Any other layer is returned as it is.
    """
    copies = getattr(module, "modules_to_save", None)
    return next(iter(copies.values())) if isinstance(copies, nn.ModuleDict) else module


class TrainedRows(Protocol):
    """peft's layer that puts the trained rows of some tokens into a frozen matrix."""

    base_layer: nn.Module
    active_adapters: list[str]

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """Return the matrix [V, D] with its trained rows, in the dtype of the matrix."""
        ...


def trained_rows(module: nn.Module | None) -> TrainedRows | None:
    """Return the layer with the trained rows of a wrapped embedding or head, if it has one."""
    return cast("TrainedRows | None", getattr(module, "token_adapter", None))


def merged_rows(rows: TrainedRows) -> Tensor:
    """Return the matrix [V, D] with its trained rows, in the dtype of the matrix."""
    return rows.get_merged_weights(rows.active_adapters)
