"""Write tensors to a safetensors file, one piece at a time.

The format is 8 bytes of length, a JSON header, and the bytes of the tensors. The writer of
safetensors copies all tensors first and holds the interpreter's lock meanwhile. This one has one
piece in memory and lets other threads run, so a checkpoint can be written during a training step
without allocating its memory twice.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash

from fitune.units import MIB

PIECE_BYTES = 16 * MIB
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a new file, flush it to the disk, and return the same hash as `file_hash`.

    The tensors may be on any device; none may change before this returns. Raises OSError.
    """
    # The widest elements first, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with path.open("xb", buffering=0) as file:
        _write(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text), digest)
        for _, tensor in ordered:
            for piece in _pieces(tensor):
                _write(file.fileno(), piece, digest)
        os.fsync(file.fileno())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the XXH3 hash (128 bits) of a file, which detects torn and damaged files.

    It is as fast as memory can be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _write(descriptor: int, piece: memoryview, digest: "xxhash.xxh3_128") -> None:
    digest.update(piece)
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the tensor's bytes on the host."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(PIECE_BYTES):
        yield memoryview(piece.cpu().numpy())
