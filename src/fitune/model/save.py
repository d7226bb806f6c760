"""From a trained model to files: a transformers directory, adapters, or minimind's `.pth`.

Whatever is written appears under its name complete or not at all: it is written beside it, flushed to the disk, and
renamed. Saving never changes the model, so a run can go on afterwards bit for bit.
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
from fitune.model.load import quiet_transformers
from fitune.model.peft_parts import BaseTunerLayer, PeftModel, get_peft_model_state_dict
from fitune.model.quantise import NF4Experts, NF4Linear
from fitune.model.tensor_file import write_tensors
from fitune.units import MIB

LINKED_BYTES = 64 * MIB
"""Files below it are copied by `link_model`."""
_MARKS = (
    "config.json",
    "adapter_config.json",
)  # what tells a model's directory from somebody's documents


def save_model(
    model: PreTrainedModel | PeftModel,
    directory: Path,
    *,
    tokenizer: Tokenizer,
    merge: bool = False,
    ends: Sequence[str] = (),
) -> None:
    """Write a directory that plain transformers loads: weights, configuration, generation settings, tokenizer and chat
    template.

    Of a model with adapters only the adapters are written (peft's layout), or with `merge` the whole model with the
    adapters added in. ends: the tokens that it has learned to end with. An earlier model in `directory` is replaced
    once the new one is complete. Raises ModelError where `directory` holds something else or cannot be written.
    """
    with replaced_directory(directory) as unfinished:
        write_files(unfinished, model_files(model, tokenizer=tokenizer, merge=merge, ends=ends))
        weights_name, tensors = saved_tensors(model, merge=merge)
        write_tensors(unfinished / weights_name, tensors)


def model_files(
    model: PreTrainedModel | PeftModel,
    *,
    tokenizer: Tokenizer,
    merge: bool = False,
    ends: Sequence[str] = (),
) -> dict[str, bytes]:
    """Every file of a saved model's directory but the weights, by name. They are the same all through a run.

    ends: the tokens that the model has learned to end with, at which a generation stops beside where it did before."""
    with TemporaryDirectory() as directory, quiet_transformers():
        if isinstance(model, PeftModel) and not merge:
            model.save_pretrained(
                directory, state_dict={}, save_embedding_layers=False
            )  # "auto" would ask the hub
            if (noted := adapted_json(model)) is not None:
                (Path(directory) / FILE).write_bytes(noted)
        else:
            plain = _plain(model)
            generation = plain.generation_config
            if generation is not None:
                known = (
                    generation.eos_token_id
                    if generation.eos_token_id is not None
                    else tokenizer.eos_token_id
                )
                known = known if isinstance(known, list) else [] if known is None else [known]
                learned = [tokenizer.convert_tokens_to_ids(end) for end in ends]
                all_ends = list(
                    dict.fromkeys([*known, *(end for end in learned if isinstance(end, int))])
                )
                generation.eos_token_id = (
                    all_ends if len(all_ends) > 1 else next(iter(all_ends), None)
                )
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
    """(name of the weights file, its tensors under the names that transformers or peft gives them there). Tied weights
    stand in it once. The tensors are the model's own memory but where its layout on disk is another (experts).

    state: the model's state dictionary, where the model itself holds a share of it only; of adapters their part."""
    if isinstance(model, PeftModel) and not merge:
        tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
        return "adapter_model.safetensors", tensors
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
    """`directory` becomes a copy of the saved model `source`. Files of LINKED_BYTES and more are the same files under
    another name, where the file system can: there, nobody may write into one. Smaller ones are copied, since people
    edit a template or a configuration in place, and libraries write adapters over the file that is there."""
    with _said_plainly(directory), replaced_directory(directory) as new:
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
    """Write the weights as minimind's own scripts do: one dictionary under its names, in float16.

    dtype None keeps the model's own type, and reading the file back then gives the same bits. Adapters are merged.
    Raises ModelError for architectures that minimind does not compute and for weights that float16 cannot hold.
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
    with _said_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, unfinished)
            _flush(unfinished)
            unfinished.replace(path)
            _flush(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def plain_tensors(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The state dictionary under transformers' names, adapters added into the weights that they adapt. The model itself
    stays as it is: adding and subtracting adapters in place would leave rounding behind."""
    if not isinstance(model, PeftModel):
        return cast(dict[str, torch.Tensor], model.state_dict())
    plain = model.get_base_model()
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in plain.state_dict().items()
        if ".lora_" not in name
    }
    compute_dtype = plain.get_input_embeddings().weight.dtype
    for name, layer in plain.named_modules():
        if isinstance(layer, NF4Linear | NF4Experts):
            name = name.removesuffix(".base_layer")
            for packed, _ in layer.named_buffers(recurse=False):
                del tensors[f"{name}.{packed}"]
            del tensors[f"{name}.weight"]
            whole = f"{name}.weight" if isinstance(layer, NF4Linear) else name
            tensors[whole] = layer.unpacked(compute_dtype)
    for name, layer in plain.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = tensors[f"{name}.weight"]
            with torch.no_grad():
                delta = sum(
                    layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters
                )
                tensors[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return tensors


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """A fresh directory to write into, which becomes `directory` when the block ends without an error.

    Only one name can change at once, so replacing is two renames: after a crash between them the earlier directory
    still lies beside as `.NAME.old`, and `recover_directory` puts it back.
    """
    recover_directory(directory)
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not any((directory / mark).is_file() for mark in _MARKS):
        raise ModelError(
            f"{directory} exists and is no model directory: give another name, nothing was overwritten"
        )
    new, old = _beside(directory, "new"), _beside(directory, "old")
    with _said_plainly(directory):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            for file in new.rglob("*"):
                _flush(file)
            _flush(new)
            if directory.exists():
                shutil.rmtree(old, ignore_errors=True)  # left by a crash after both renames
                directory.rename(old)
            new.rename(directory)
            _flush(directory.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def recover_directory(directory: Path) -> None:
    """Put back what a crash left between the two renames of `replaced_directory`; does nothing otherwise."""
    old = _beside(directory, "old")
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
    """transformers holds a layer's experts in two tensors, [E, 2F, D] (gate above up) and [E, D, F]; minimind in 3E."""
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
    """Tied tensors stay tied."""
    done: dict[int, torch.Tensor] = {}
    return {
        name: done.setdefault(tensor.data_ptr(), tensor.to(dtype))
        for name, tensor in tensors.items()
    }


@contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path} cannot be written ({first}); what was there before is untouched"
        ) from error


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
