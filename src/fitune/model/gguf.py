"""Read GGUF files through transformers, but parse their header only once.

transformers knows the architectures, their names in llama.cpp and how each of them rearranged its
weights, but it parses the whole header again for the configuration, the weights and the tokenizer.
Inside `gguf_read_once` the same file is parsed once, and a model that was split into several files
is read as one.
"""

import functools
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PretrainedConfig, modeling_gguf_pytorch_utils
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fitune.errors import ModelError

#: The bytes of an entry in the header whose name has no letters. That of a tensor has length,
#: dimensions, type and offset; that of a key has length, type and one byte.
LEAST_TENSOR_BYTES, LEAST_KEY_BYTES = 24, 13


#: the name of one of several files that contain a model
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_EXPERT_PARTS = ("gate", "up", "down")


def read_gguf(
    config: PretrainedConfig, dtype: torch.dtype, **location: object
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return the dequantised tensors, named as in transformers, and its loading report.

    The report has missing_keys and the other keys of transformers' loading info. A tensor that the
    file lacks has random values here and is listed there.

    transformers marks a model read from GGUF as quantised, which forbids training and saving it,
    but its tensors are ordinary; so only they are returned. The parsed file is freed, since it
    keeps the whole file mapped, and all that was read of it in memory.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = model_class.from_pretrained(
        config=config, dtype=dtype, output_loading_info=True, **location
    )
    _parsed.cache_clear()
    return cast(dict[str, torch.Tensor], model.state_dict()), report


def check_gguf(path: Path) -> None:
    """Raise ModelError if the file is one of several that are incomplete, or has incomplete layers.

    Nothing is checked without the gguf package.
    """
    with gguf_read_once():
        try:
            import gguf
        except ImportError:
            return
        reader = gguf.GGUFReader(path)
    architecture = _field(reader, "general.architecture")
    if len(gguf_parts(path)) > 1 and architecture in GGUF_ARCHS:
        raise ModelError(
            f"{path} is one of several files, which transformers does not read for "
            f"'{architecture}': join them with "
            "llama-gguf-split --merge"
        )
    names = {str(tensor.name) for tensor in reader.tensors}
    num_layers = _field(reader, f"{architecture}.block_count")
    layers = {int(found[1]) for name in names if (found := re.match(r"blk\.(\d+)\.", name))}
    surplus = sorted(layer for layer in layers if num_layers is not None and layer >= num_layers)
    surplus = surplus[int(_field(reader, f"{architecture}.nextn_predict_layers") or 0) :]
    if surplus:
        raise ModelError(
            f"{path} holds layer {surplus[0]}, but its header says {num_layers} layers: copy it again"
        )
    for layer in sorted(layers):
        experts = [kind for kind in _EXPERT_PARTS if f"blk.{layer}.ffn_{kind}_exps.weight" in names]
        if (
            0 < len(experts) < len(_EXPERT_PARTS)
            and f"blk.{layer}.ffn_gate_up_exps.weight" not in names
        ):
            lacking = next(kind for kind in _EXPERT_PARTS if kind not in experts)
            raise ModelError(
                f"{path} lacks blk.{layer}.ffn_{lacking}_exps.weight, a part of its experts: copy it again"
            )


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse an unchanged GGUF file once, in this block and from one such block to the next.

    Its table of names is also made once (transformers makes one for each submodule), and the
    progress bar is off. Nothing changes without the gguf package.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    originals = gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.tqdm
    gguf.GGUFReader, gguf.get_tensor_name_map = _reader, _names
    modeling_gguf_pytorch_utils.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.tqdm = originals


def _reader(path: str | os.PathLike[str]) -> Any:
    parts = gguf_parts(Path(path))
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None:
        raise ModelError(
            f"{path} is one of {len(parts)} files of a model, and {missing.name} is not beside it"
        )
    for part in parts:
        _check_header(os.fspath(part), part.stat().st_size)
    return _parsed(
        tuple((str(part), part.stat().st_mtime_ns, part.stat().st_size) for part in parts)
    )


def gguf_parts(path: Path) -> list[Path]:
    """Return the files that llama.cpp split the model into; the file itself if it is whole."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    return [
        path.with_name(f"{found[1]}-{n:05d}-of-{found[2]}.gguf")
        for n in range(1, int(found[2]) + 1)
    ]


def _check_header(path: str, size_bytes: int) -> None:
    """Raise ModelError if the file is too small for the number of entries in its header.

    The reader trusts those numbers and iterates over as many entries, so a damaged file would
    occupy it forever.
    """
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(
            f"{path} is no GGUF file: it does not begin with the letters GGUF; copy it again"
        )
    num_tensors, num_keys = struct.unpack("<QQ", head[8:])
    if num_tensors * LEAST_TENSOR_BYTES + num_keys * LEAST_KEY_BYTES > size_bytes:
        raise ModelError(
            f"{path} is damaged or not whole: its {size_bytes:,} bytes cannot hold the "
            f"{num_tensors:,} tensors and "
            f"{num_keys:,} keys that its head promises; copy it again"
        )


@functools.lru_cache(maxsize=1)
def _parsed(parts: tuple[tuple[str, int, int], ...]) -> Any:
    """Return the reader of the first file, with the tensors of all files.

    parts: for each file its path, and values that change when the file changes.
    """
    readers = [_array_reader(path) for path, *_ in parts]
    first, path = readers[0], parts[0][0]
    num_parts = _field(first, "split.count") or 1
    if num_parts != len(parts):
        raise ModelError(
            f"{path} is one of {num_parts} files of a model: give them their names "
            f"(-00001-of-{num_parts:05d}.gguf), or join them with llama-gguf-split --merge"
        )
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    wanted = _field(first, "split.tensors.count")
    if num_parts > 1 and wanted not in (None, len(tensors)):
        raise ModelError(
            f"the {num_parts} files of {path} hold {len(tensors)} of {wanted} tensors: copy them again"
        )
    first.tensors = tensors
    return first


def gguf_value(path: Path, key: str) -> object:
    """Return a value of the file's header; None if the header lacks it."""
    return _field(_reader(path), key)


def _field(reader: Any, name: str) -> Any:
    """Return the value of a key in the header; None if the header lacks it."""
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _array_reader(path: str) -> Any:
    from gguf.gguf_reader import GGUFReader

    class ArrayReader(GGUFReader):  # type: ignore[misc]
        """Views the mapped file as a plain array.

        Slicing of np.memmap takes two thirds of the parsing time.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    return ArrayReader(path)


@functools.lru_cache(maxsize=1)
def _names(arch: object, num_layers: int) -> object:
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(arch, num_layers)
