"""Describe the card that a recording predicts, and what follows from its compute capability."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

Attention = Literal["auto", "flash", "efficient", "math", "eager"]
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Generation:
    """What cards of one compute capability have in common.

    Sources: CUDA programming guide, compute capabilities; NVIDIA's data sheets; CCCL,
    cub/device/dispatch/tuning, for the tiles.
    """

    #: resident threads of one multiprocessor
    threads: int
    #: multiprocessors of the generation's largest card
    multiprocessors: int
    #: whether a block can have 160 KiB of shared memory or more; others have about 100 KiB, and 64
    #: KiB before Ampere
    large_shared_memory: bool
    #: cuda/CublasHandlePool.cpp, getChosenWorkspaceSize
    cublas_workspace_kib: int
    #: transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention
    prefers_cudnn: bool
    #: pairs of 8-byte keys and 8-byte values that a block sorts at once
    sort_tile: int
    #: keys that a block searches at once for the first of each key
    unique_tile: int


# The default CUBLAS_WORKSPACE_CONFIG, :4096:2:16:8
_SMALL = 2 * 4096 + 8 * 16
_LARGE = 32 * 1024
GENERATIONS: dict[Capability, Generation] = {
    (6, 0): Generation(2048, 56, False, _SMALL, False, 2816, 320),
    (6, 1): Generation(2048, 30, False, _SMALL, False, 2816, 320),
    (7, 0): Generation(2048, 80, False, _SMALL, False, 2816, 320),
    (7, 5): Generation(1024, 72, False, _SMALL, False, 2816, 320),
    (8, 0): Generation(2048, 108, True, _SMALL, False, 3840, 1344),
    (8, 6): Generation(1536, 84, False, _SMALL, False, 3840, 320),
    (8, 7): Generation(1536, 16, True, _SMALL, False, 3840, 320),
    (8, 9): Generation(1536, 142, False, _SMALL, False, 3840, 320),
    (9, 0): Generation(2048, 132, True, _LARGE, True, 4608, 4928),
    (10, 0): Generation(2048, 148, True, _LARGE, True, 4608, 4928),
    (10, 3): Generation(2048, 148, True, _LARGE, True, 4608, 4928),
    (12, 0): Generation(1536, 188, False, _LARGE, False, 4608, 4928),
    (12, 1): Generation(1536, 48, False, _LARGE, False, 4608, 4928),
}


def _installed_torch() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class CudaTarget:
    """The card that a recording predicts."""

    compute_capability: Capability = (8, 0)
    #: "auto" follows PyTorch's own choice. "flash", "efficient" and "math" force a kernel of
    #: `scaled_dot_product_attention`. "eager" changes nothing here: it says that the model itself
    #: computes the attention scores.
    attention: Attention = "auto"
    #: the name and memory that a loop gets when it queries them
    name: str = field(default="CUDA", compare=False)
    total_bytes: int = field(default=0, compare=False)
    #: None if unknown
    multiprocessors: int | None = None
    #: the PyTorch version whose kernels run on the card
    torch_version: tuple[int, int] = field(default_factory=lambda: _installed_torch())

    @property
    def generation(self) -> Generation:
        """Return the generation of the card's compute capability.

        For an unknown capability, that is the nearest known one below it.
        """
        return GENERATIONS[self._known_capability]

    @property
    def num_multiprocessors(self) -> int:
        """Return the multiprocessors of this card, or of the largest card of its generation."""
        return self.multiprocessors or self.generation.multiprocessors

    @property
    def _known_capability(self) -> Capability:
        return max(
            (each for each in GENERATIONS if each <= self.compute_capability),
            default=min(GENERATIONS),
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines of `MemoryTrace.source` on the card and what is assumed about it."""
        major, minor = self.compute_capability
        yield f"kernels of CUDA, compute capability {major}.{minor}, attention {self.attention}"
        yield from self.assumptions()

    def assumptions(self) -> Iterator[str]:
        """Yield what is assumed about a card that is not fully known."""
        if self._known_capability != self.compute_capability:
            (major, minor), (its_major, its_minor) = self.compute_capability, self._known_capability
            yield (
                f"assumed: kernels of compute capability {major}.{minor} allocate as those of {its_major}.{its_minor}"
            )
        if self.multiprocessors is None:
            yield (
                f"assumed: {self.num_multiprocessors} multiprocessors, as the largest card of its generation has"
            )
