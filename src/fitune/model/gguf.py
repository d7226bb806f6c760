"""Reading GGUF through transformers, without paying for its header three times.

transformers knows the architectures, their names in llama.cpp and how each rearranged its weights, and reads the whole
header anew for the configuration, the weights and the tokenizer. Inside `gguf_read_once` the same file is parsed once.
"""

import functools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PretrainedConfig, modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fitune.errors import ModelError

LEAST_TENSOR_BYTES, LEAST_KEY_BYTES = 24, 13
"""Of an entry with a name of no letters: length, dimensions, type and offset; length, type and one byte."""


def read_gguf(config: PretrainedConfig, dtype: torch.dtype, **location: Any) -> dict[str, torch.Tensor]:
    """Dequantised tensors under transformers' names. transformers marks a model read from GGUF as quantised, which
    forbids training and saving it; its tensors are ordinary, so only they are kept. The parsed file is let go: it keeps
    the whole of it mapped, and what was read of it resident."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(config=config, dtype=dtype, **location)
    _parsed.cache_clear()
    return cast(dict[str, torch.Tensor], model.state_dict())


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within this block, and from one such block to the next, an unchanged GGUF file is parsed once and its table of
    names is made once (transformers makes one per submodule). Also without its progress bar. No effect without the gguf
    package."""
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
    state = os.stat(path)
    _check_header(os.fspath(path), state.st_size)
    return _parsed(os.fspath(path), state.st_mtime_ns, state.st_size)


def _check_header(path: str, size_bytes: int) -> None:
    """The reader believes the counts at the head of a file, and goes through as many entries: a damaged one would keep
    it for ever. Raises ModelError."""
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it does not begin with the letters GGUF; copy it again")
    num_tensors, num_keys = struct.unpack("<QQ", head[8:])
    if num_tensors * LEAST_TENSOR_BYTES + num_keys * LEAST_KEY_BYTES > size_bytes:
        raise ModelError(
            f"{path} is damaged or not whole: its {size_bytes:,} bytes cannot hold the {num_tensors:,} tensors and "
            f"{num_keys:,} keys that its head promises; copy it again"
        )


@functools.lru_cache(maxsize=1)
def _parsed(path: str, changed_ns: int, size_bytes: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    class ArrayReader(GGUFReader):  # type: ignore[misc]
        """Views the mapped file as a plain array: slicing np.memmap takes two thirds of the parsing."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    return ArrayReader(path)


@functools.lru_cache(maxsize=1)
def _names(arch: Any, num_layers: int) -> Any:
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(arch, num_layers)
