"""Read weight files for a loop or a model's constructor while there is no card.

torch.load refuses to put a tensor on a missing device. safetensors reads straight into a card's
memory and ends the process. Here both read into host memory, and the caller decides where the
tensors go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from fitune.recorder.library_patches import when_imported

#: (tensor, device) -> the tensor as the reader of the file gets it. The device is any map_location
#: that torch.load accepts.
Put = Callable[[Tensor, object], Tensor]


@contextmanager
def weight_files(put: Put) -> Iterator[None]:
    """Read the files that this block opens into host memory; return tensors through `put`."""
    load = torch.load

    def load_on_host(
        file: Any, map_location: object = None, *args: object, **options: Any
    ) -> object:
        with on_host():
            content = load(file, "cpu", *args, **options)
        return tree_map_only(Tensor, lambda tensor: put(tensor, map_location), content)

    rebuild: Callable[..., Tensor] = torch._utils._rebuild_tensor

    def rebuild_on_host(storage: torch.TypedStorage, *args: object) -> Tensor:
        # what a script unpickles by itself, such as a checkpoint of which it reads one tensor at a
        # time, has its data; a fake tensor cannot take them
        # `storage.device` warns that this kind of storage is old
        is_meta = storage._untyped_storage.device.type == "meta"
        with nullcontext() if is_meta else on_host():
            return rebuild(storage, *args)

    with (
        patch.object(torch, "load", load_on_host),
        patch.object(torch._utils, "_rebuild_tensor", rebuild_on_host),
        when_imported({"safetensors": partial(_reads_to_host, put)}),
    ):
        yield


@contextmanager
def _reads_to_host(put: Put, safetensors: Any) -> Iterator[None]:
    """Replace safetensors.safe_open, which safetensors.torch has under the same name."""
    safe_open = safetensors.safe_open

    class Opened:
        """Replaces safetensors.safe_open."""

        def __init__(
            self, filename: object, framework: object, device: object = "cpu", **options: object
        ) -> None:
            self._file: Any = safe_open(filename, framework, "cpu", **options)
            self._device = device

        def __enter__(self) -> "Opened":
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            with on_host():
                tensor = self._file.get_tensor(name)
            return put(tensor, self._device) if isinstance(tensor, Tensor) else tensor

        def _names(self) -> list[str]:
            return list(self._file.keys())

        def get_tensors(self) -> dict[str, object]:
            return {name: self.get_tensor(name) for name in self._names()}

    import_module("safetensors.torch")
    with (
        patch.object(safetensors, "safe_open", Opened),
        patch.object(safetensors.torch, "safe_open", Opened),
    ):
        yield


@contextmanager
def on_host() -> Iterator[None]:
    """Leave all dispatch and function modes for this block, since they would move the tensors."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
