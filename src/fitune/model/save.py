"""Save a trained model: as a transformers directory, as adapters, or as minimind's `.pth`.

Files are written under a temporary name, flushed to the disk, and renamed, so they appear under
their final name complete or not at all. Saving never changes the model, so a run continues
afterwards bit for bit.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fitune.errors import ModelError
from fitune.model.adapted_model import FILE, adapted_json
from fitune.model.adapter_start import as_lora, lora_settings
from fitune.model.ends import add_ends
from fitune.model.load import quiet_transformers
from fitune.model.peft_parts import LoraLayer, PeftModel, get_peft_model_state_dict
from fitune.model.quantise import NF4Experts, NF4Linear
from fitune.model.tensor_file import write_tensors
from fitune.model.trained_whole import merged_rows, trained_layer, trained_rows
from fitune.units import MIB

#: `link_model` copies files below this size.
LINKED_BYTES = 64 * MIB
#: Only a directory with one of these files is a model, which may be replaced.
_MARKS = ("config.json", "adapter_config.json")


def save_model(
    model: PreTrainedModel | PeftModel,
    directory: Path,
    *,
    tokenizer: Tokenizer,
    merge: bool = False,
    ends: Sequence[str] = (),
    card: str | None = None,
) -> None:
    """Write a directory that plain transformers loads, with tokenizer and chat template.

    Of a model with adapters only the adapters are written (in peft's layout), or with `merge` the
    whole model with merged adapters. An earlier model in `directory` is replaced once the new one
    is complete.

    ends: the tokens with which the model has learned to end.
    card: the text of its README.md.

    Raises ModelError if `directory` contains something else or cannot be written.
    """
    with replaced_directory(directory) as unfinished:
        write_files(unfinished, model_files(model, tokenizer=tokenizer, merge=merge, ends=ends))
        if card is not None:
            (unfinished / "README.md").write_text(card, encoding="utf-8")
        weights_name, tensors = saved_tensors(model, merge=merge)
        write_tensors(unfinished / weights_name, tensors)


def model_files(
    model: PreTrainedModel | PeftModel,
    *,
    tokenizer: Tokenizer,
    merge: bool = False,
    ends: Sequence[str] = (),
) -> dict[str, bytes]:
    """Return every file of a saved model except the weights, by name; a run never changes them.

    ends: the tokens with which the model has learned to end. A generation stops at them in addition
        to the tokens where it stopped before.
    """
    with TemporaryDirectory() as directory, quiet_transformers():
        if isinstance(model, PeftModel) and not merge:
            model.create_or_update_model_card(directory)
            lora_settings(model).save_pretrained(directory)
            if (noted := adapted_json(model)) is not None:
                (Path(directory) / FILE).write_bytes(noted)
        else:
            plain = _plain(model)
            add_ends(plain, tokenizer, ends)
            plain.save_pretrained(directory, state_dict={})
        tokenizer.save_pretrained(directory)
        files = (
            path
            for path in Path(directory).rglob("*")
            if path.is_file() and path.suffix != ".safetensors"
        )
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def saved_tensors(
    model: PreTrainedModel | PeftModel,
    *,
    merge: bool = False,
    state: dict[str, torch.Tensor] | None = None,
) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the name of the weights file and its tensors, named as in transformers or peft.

    Tied weights are in it once. The tensors share the model's memory, except where the layout in
    files is another (experts).

    state: the model's state dictionary, where the model itself holds only a shard of it; for
        adapters their part of it.
    """
    if isinstance(model, PeftModel) and not merge:
        tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
        return "adapter_model.safetensors", as_lora(model, tensors)
    plain = _plain(model)
    left_out = set(plain._keys_to_ignore_on_save or ())
    named = plain_tensors(model) if state is None else state
    tensors = {name: tensor for name, tensor in named.items() if name not in left_out}
    return "model.safetensors", revert_weight_conversion(
        plain, remove_tied_weights_from_state_dict(tensors, plain)
    )


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def link_model(source: Path, directory: Path) -> None:
    """Make `directory` a copy of the saved model `source`, with hard links to its large files.

    Files of LINKED_BYTES and more are linked if the file system can do that; nobody may write into
    those. Smaller files are copied, since users edit a template or a configuration in place, and
    libraries overwrite adapters in place.
    """
    with _errors_as_model_errors(directory), replaced_directory(directory) as new:
        for file in (path for path in source.rglob("*") if path.is_file()):
            target = new / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.stat().st_size < LINKED_BYTES:
                shutil.copy2(file, target)
                continue
            try:
                os.link(file, target)
            except OSError:
                shutil.copy2(file, target)


def export_minimind(
    model: PreTrainedModel | PeftModel, path: Path, *, dtype: torch.dtype | None = torch.float16
) -> None:
    """Write the weights as minimind's own scripts do: one dictionary with its names, in float16.

    With dtype None the model's dtype is kept, and reading the file gives the same bits. Adapters
    are merged. Raises ModelError for architectures that minimind does not compute and for weights
    that float16 cannot represent.
    """
    reason = _not_minimind(model)
    if reason is not None:
        raise ModelError(f"this model cannot be written as minimind's .pth: {reason}. Use --to hf")
    tensors = _with_single_experts(plain_tensors(model))
    if dtype is not None:
        tensors = _cast(tensors, dtype)
        overflown = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if overflown:
            raise ModelError(
                f"{overflown[0]} holds values beyond {dtype}: export it in the model's own type"
            )
    unfinished = path.with_name(f".{path.name}.new")
    with _errors_as_model_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, unfinished)
            _flush(unfinished)
            unfinished.replace(path)
            _flush(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def plain_tensors(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the state dictionary with transformers' names and merged adapters.

    The model itself does not change: to merge and unmerge adapters in place would leave rounding
        errors.
    """
    if not isinstance(model, PeftModel):
        return cast(dict[str, torch.Tensor], model.state_dict())
    plain = model.get_base_model()
    tensors = {
        name.replace(".base_layer.", ".").replace(".token_adapter.", "."): tensor
        for name, tensor in plain.state_dict().items()
        if not any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_"))
    }
    tensors = {name.replace(".original_module.", "."): each for name, each in tensors.items()}
    compute_dtype = _frozen_dtype(plain)
    _put_trained_layers(plain, tensors)
    for name, layer in plain.named_modules():
        if isinstance(layer, NF4Linear | NF4Experts):
            name = name.removesuffix(".base_layer")
            for packed, _ in layer.named_buffers(recurse=False):
                del tensors[f"{name}.{packed}"]
            del tensors[f"{name}.weight"]
            whole = f"{name}.weight" if isinstance(layer, NF4Linear) else name
            tensors[whole] = layer.unpacked(compute_dtype)
    for name, layer in plain.named_modules():
        if isinstance(layer, LoraLayer):
            weight = tensors[f"{name}.weight"]
            with torch.no_grad():
                delta = sum(
                    layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters
                )
                merged = weight.float() + delta
                for magnitude in layer.lora_magnitude_vector.values():
                    is_rows = not layer.fan_in_fan_out
                    norm = torch.linalg.vector_norm(merged, dim=int(is_rows), keepdim=True)
                    merged *= magnitude.weight.float().view_as(norm) / norm
                tensors[f"{name}.weight"] = merged.to(weight.dtype)
    return tensors


def _frozen_dtype(plain: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the embedding in the files."""
    embedding = plain.get_input_embeddings()
    frozen = getattr(embedding, "original_module", embedding)
    return cast(torch.dtype, frozen.weight.dtype)


def _put_trained_layers(plain: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the tensors of layers that were trained whole, or in some rows; tied ones stay tied."""
    merged: dict[int, torch.Tensor] = {}
    for name, layer in plain.named_modules():
        trained = trained_layer(layer)
        if trained is not layer and trained is not None:
            for key, tensor in trained.state_dict().items():
                before = tensors[f"{name}.{key}"]
                tensors[f"{name}.{key}"] = merged.setdefault(
                    tensor.data_ptr(), tensor.to(before.dtype)
                )
        elif (rows := trained_rows(layer)) is not None:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = merged.setdefault(
                weight.data_ptr(), merged_rows(rows).detach()
            )


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yield a new directory, which becomes `directory` when the block ends without an error.

    Only one name can change atomically, so a replacement takes two renames. After a crash between
    them the earlier directory still exists as `.NAME.old`, and `recover_directory` restores it.
    Raises ModelError if `directory` is no model, or cannot be written.
    """
    recover_directory(directory)
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not any((directory / mark).is_file() for mark in _MARKS):
        raise ModelError(
            f"{directory} exists and is no model directory: give another name, nothing was overwritten"
        )
    new, old = _temporary_name(directory, "new"), _temporary_name(directory, "old")
    with _errors_as_model_errors(directory):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            for file in new.rglob("*"):
                _flush(file)
            _flush(new)
            if directory.exists():
                # Left by a crash after both renames.
                shutil.rmtree(old, ignore_errors=True)
                directory.rename(old)
            new.rename(directory)
            _flush(directory.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def recover_directory(directory: Path) -> None:
    """Restore what a crash left between the two renames of `replaced_directory`, if it did."""
    old = _temporary_name(directory, "old")
    if old.is_dir() and not directory.exists():
        old.rename(directory)


def _not_minimind(model: PreTrainedModel | PeftModel) -> str | None:
    config = model.config
    if config.model_type not in ("llama", "qwen3", "qwen3_moe"):
        return f"'{config.model_type}' is another architecture"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "its linear layers have biases"
    if getattr(config, "sliding_window", None) is not None:
        return "it has sliding windows"
    if config.rope_parameters["rope_type"] != "default":
        return f"its positions are scaled ({config.rope_parameters['rope_type']})"
    if config.model_type == "qwen3_moe" and (
        config.mlp_only_layers or config.decoder_sparse_step != 1
    ):
        return "some of its layers have experts and some have none"
    return None


def _with_single_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Split the tensors of a layer's experts into one tensor for each expert, as minimind has them.

    transformers has two tensors, [E, 2F, D] (gate before up) and [E, D, F]; minimind has 3E.
    """
    single: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition("experts.")
        if kind == "gate_up_proj":
            for number, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                single[f"{stem}experts.{number}.gate_proj.weight"] = gate.clone()
                single[f"{stem}experts.{number}.up_proj.weight"] = up.clone()
        elif kind == "down_proj":
            for number, expert in enumerate(tensor):
                single[f"{stem}experts.{number}.down_proj.weight"] = expert.clone()
        else:
            single[name] = tensor
    return single


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors in `dtype`; tied tensors remain tied."""
    done: dict[int, torch.Tensor] = {}
    return {
        name: done.setdefault(tensor.data_ptr(), tensor.to(dtype))
        for name, tensor in tensors.items()
    }


@contextmanager
def _errors_as_model_errors(path: Path) -> Iterator[None]:
    """Raise ModelError with one message where a file cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path} cannot be written ({first}); what was there before is untouched"
        ) from error


def _temporary_name(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
