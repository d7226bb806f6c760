"""Rotate heads by their positions (rotary embeddings), in few kernels."""

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Cosines [B, S, 1, D], and sines for the first and the second half of D [B, S, 1, D / 2]."""

    cos: Tensor
    first: Tensor
    second: Tensor


def angles_of(cos: Tensor, sin: Tensor) -> Angles:
    """Return what `rotate_heads` needs, from what a model computes: [B, S, D] each."""
    return Angles(cos.unsqueeze(2), *sin.unsqueeze(2).chunk(2, dim=-1))


def rotate_heads(heads: Tensor, angles: Angles, dtype: torch.dtype) -> Tensor:
    """Return [B, S, H, D] times cos plus, in each half of D, the other half times a sine.

    dtype: that of the result.
    """
    return _rotate(heads, angles.cos, (-1, angles.first), (1, angles.second)).to(dtype)


def rotate_back(grad: Tensor, angles: Angles) -> Tensor:
    """Return the gradient of the heads from that of the rotated ones."""
    return _rotate(grad, angles.cos, (1, angles.second), (-1, angles.first))


def _rotate(
    heads: Tensor, cos: Tensor, upper: tuple[int, Tensor], lower: tuple[int, Tensor]
) -> Tensor:
    """Rotate heads. upper, lower: (sign, sine) for the first and the second half."""
    rotated = heads * cos
    halves = reversed(heads.chunk(2, dim=-1))
    parts = zip(rotated.chunk(2, dim=-1), halves, (upper, lower), strict=True)
    for into, other, (sign, sine) in parts:
        into.addcmul_(other, sine, value=sign)
    return rotated


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return the same float32 random numbers at each call, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        for shape in shapes
    ]
