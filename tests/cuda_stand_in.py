"""PyTorch's CUDA build on a machine without a driver, or with a card that nothing may touch, for the CPU build."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch

SOURCES = [torch.cuda, torch.accelerator]


@contextmanager
def cuda_build(*, num_cards: int) -> Iterator[list[str]]:
    """Each function of torch._C that torch.cuda and torch.accelerator call raises, as without a driver, except for
    those that start nothing. Yields the names of those that were called."""
    called: list[str] = []
    answers: dict[str, Callable[..., Any]] = {
        "_accelerator_getAccelerator": lambda: torch.device("cuda"),
        "_cuda_getDeviceCount": lambda: num_cards,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }

    def raising(name: str) -> Callable[..., NoReturn]:
        def call(*_: Any, **__: Any) -> NoReturn:
            called.append(name)
            raise RuntimeError(
                f"{name}: CUDA driver version is insufficient for CUDA runtime version"
            )

        return call

    with ExitStack() as stack:
        for name in _names():
            function = answers.get(name) or raising(name)
            stack.enter_context(patch.object(torch._C, name, function, create=True))
        stack.enter_context(patch.object(torch.cuda, "_is_compiled", lambda: True))
        stack.enter_context(patch.object(torch.cuda, "_device_count_nvml", lambda: -1))
        stack.enter_context(patch.object(torch.cuda, "_cached_device_count", None))
        yield called


def _names() -> set[str]:
    files = [path for module in SOURCES for path in Path(str(module.__file__)).parent.glob("*.py")]
    return {
        name
        for path in files
        for name in re.findall(r"\b_C\.(_(?:cuda|accelerator)_\w+)", path.read_text())
    }
