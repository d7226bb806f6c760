"""Let libraries choose their Triton kernels, which work in place, where there is no card.

TRL computes log-probabilities with such kernels on a card, and logits for the targets alone.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

from fitune.recorder.library_patches import when_imported


@contextmanager
def triton_kernels() -> Iterator[None]:
    """Let TRL compute its loss in this block as it does on a card."""
    with when_imported({"trl.kernels.chunked_logprob": _of_kernels, "trl.trainer.utils": _chosen}):
        yield


class _InPlace:
    """Stands for a Triton kernel, which writes into its arguments and allocates nothing."""

    def __getitem__(self, _: object) -> Callable[..., None]:
        return lambda *unused, **named: None


def _chosen(module: object) -> AbstractContextManager[object]:
    return patch.object(module, "_use_triton", lambda _: True, create=True)


def _of_kernels(kernels: object) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(_chosen(kernels))
    for name in ("_forward_kernel", "_backward_kernel"):
        stack.enter_context(patch.object(kernels, name, _InPlace(), create=True))
    stack.enter_context(patch.object(kernels, "_addmm_fp32", lambda *_: None, create=True))
    grid = types.SimpleNamespace(cdiv=lambda *_: 1)
    stack.enter_context(patch.object(kernels, "triton", grid, create=True))
    return stack
