"""The card that is recorded for, and what follows from its compute capability: one table."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

Attention = Literal["auto", "flash", "efficient", "math", "eager"]
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Generation:
    """threads: that one multiprocessor holds, and multiprocessors: of its largest card (CUDA programming guide, compute
    capabilities; NVIDIA's data sheets). large_shared_memory: whether a block can have 160 KiB and more; the others have
    about 100, and 64 before Ampere. cublas_workspace_kib: cuda/CublasHandlePool.cpp, getChosenWorkspaceSize.
    prefers_cudnn: transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention. sort_tile: keys of 8 bytes with values
    of 8 that a block sorts at once, single_sort_tile: that are sorted by one block alone, unique_tile: that it looks
    through for the first of each key (CCCL, cub/device/dispatch/tuning)."""

    threads: int
    multiprocessors: int
    large_shared_memory: bool
    cublas_workspace_kib: int
    prefers_cudnn: bool
    sort_tile: int
    unique_tile: int


_SMALL = 2 * 4096 + 8 * 16  # :4096:2:16:8
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
    """The card that is recorded for. attention: "auto" follows PyTorch's own choice; "flash", "efficient" and "math"
    force one for `scaled_dot_product_attention`; "eager" says that the model itself materialises scores, so it
    changes nothing here. name, total_bytes: what a loop is told that asks. multiprocessors: None where they are not
    known. torch_version: whose kernels run there."""

    compute_capability: Capability = (8, 0)
    attention: Attention = "auto"
    name: str = field(default="CUDA", compare=False)
    total_bytes: int = field(default=0, compare=False)
    multiprocessors: int | None = None
    torch_version: tuple[int, int] = field(default_factory=lambda: _installed_torch())

    @property
    def generation(self) -> Generation:
        """Of the card's compute capability, or of the nearest known one below it."""
        return GENERATIONS[self._known_capability]

    @property
    def num_multiprocessors(self) -> int:
        """Of this card, or of the largest of its generation."""
        return self.multiprocessors or self.generation.multiprocessors

    @property
    def _known_capability(self) -> Capability:
        return max((each for each in GENERATIONS if each <= self.compute_capability), default=min(GENERATIONS))

    def assumptions(self) -> Iterator[str]:
        """What is taken for granted about a card that is not known well."""
        if self._known_capability != self.compute_capability:
            (major, minor), (its_major, its_minor) = self.compute_capability, self._known_capability
            yield f"assumed: kernels of compute capability {major}.{minor} allocate as those of {its_major}.{its_minor}"
        if self.multiprocessors is None:
            yield f"assumed: {self.num_multiprocessors} multiprocessors, as the largest card of its generation has"
