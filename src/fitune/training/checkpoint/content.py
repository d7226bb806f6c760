"""What a checkpoint stores: tensors of the model and the optimizer, counters and random numbers."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fitune.batch_size.growth import batch_state
from fitune.batch_size.noise import NoiseAverages
from fitune.distributed.checkpoint import ShardedTensors
from fitune.distributed.sharding import Shards
from fitune.machine.process_memory import MemoryPeak
from fitune.model.save import saved_tensors
from fitune.model.tensor_file import write_tensors
from fitune.step.assemble import Setup
from fitune.training.checkpoint.files import Json
from fitune.training.state import RunState


@dataclass(frozen=True)
class WholeTensors:
    """The tensors of a model that is not sharded, as they are on the device now."""

    #: name of the file of `model` in the directory model/
    model_file: str
    #: what transformers or peft would save
    model: Mapping[str, torch.Tensor]
    #: what training changes, by the model's own names; None if `model` holds the same tensors
    weights: Mapping[str, torch.Tensor] | None
    #: by STATE/PARAMETER
    optimizer: Mapping[str, torch.Tensor]
    #: by parameter and state
    optimizer_scalars: Json

    @classmethod
    def of(cls, setup: Setup) -> "WholeTensors":
        """Collect the tensors without copying them, except the buffers."""
        buffers = {tensor.data_ptr() for tensor in setup.model.buffers()}

        def with_copied_buffers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            # a forward may change a buffer while the tensors are being written
            return {
                name: t.clone() if t.data_ptr() in buffers else t for name, t in tensors.items()
            }

        live = live_tensors(setup.model)
        model_file, model = saved_tensors(setup.model)
        is_same = live.keys() == model.keys() and all(
            live[name].data_ptr() == model[name].data_ptr() for name in live
        )
        weights = None if is_same else with_copied_buffers(live)
        optimizer, scalars = optimizer_state(setup)
        return cls(model_file, with_copied_buffers(model), weights, optimizer, scalars)

    @property
    def num_bytes(self) -> int:
        parts = (self.model, self.weights or {}, self.optimizer)
        return sum(tensor.nbytes for tensors in parts for tensor in tensors.values())

    def write(self, directory: Path, *, begin: Callable[[], None]) -> dict[str, str]:
        """Write the tensors to the directory that `begin` creates; return each file's hash."""
        begin()
        parts = {f"model/{self.model_file}": self.model, "optimizer.safetensors": self.optimizer}
        if self.weights is not None:
            parts["weights.safetensors"] = self.weights
        (directory / "model").mkdir()
        return {name: write_tensors(directory / name, tensors) for name, tensors in parts.items()}


def sharded_tensors(setup: Setup, shards: Shards) -> ShardedTensors:
    weights = {f"weights/{name}": tensor for name, tensor in live_tensors(setup.model).items()}
    optimizer, scalars = optimizer_state(setup)
    optimizer = {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    return ShardedTensors(setup.model, shards, weights | optimizer, scalars)


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters and the buffers of a saved model, by the model's own names.

    A parameter that several modules share is listed once.
    """
    trained = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    saved = model.state_dict().keys()
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def optimizer_state(setup: Setup) -> tuple[dict[str, torch.Tensor], Json]:
    """Return the optimizer's tensors by STATE/PARAMETER, and other values by parameter and state."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Json] = {}
    for name, parameter in setup.model.named_parameters():
        for key, value in setup.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def state_json(state: RunState) -> Json:
    """Convert the state to JSON, with numbers that are not finite as text, as in the logs."""
    content: Json = _as_text(asdict(state))
    return content


def read_state(saved: Mapping[str, Any]) -> RunState:
    """Convert what `state_json` returned back to a state."""
    content: Json = _as_numbers(saved)
    nested: Json = {
        "peak": MemoryPeak(**content["peak"]),
        "noise": NoiseAverages(**content["noise"]),
        "preconditioned_noise": NoiseAverages(**content["preconditioned_noise"]),
        "batch": batch_state(content["batch"]),
        "eval_losses": tuple(content["eval_losses"]),
    }
    return RunState(**(content | nested))


def random_state(device: torch.device) -> Json:
    """Return the state of all generators that a model may draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    on_cuda = device.type == "cuda"
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state(device)) if on_cuda else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def set_random_state(content: Json, device: torch.device) -> None:
    torch.set_rng_state(_byte_tensor(content["torch"]))
    if device.type == "cuda" and content["cuda"] is not None:
        torch.cuda.set_rng_state(_byte_tensor(content["cuda"]), device)
    version, internal_state, gauss = content["python"]
    random.setstate((version, tuple(internal_state), gauss))
    np.random.set_state(tuple(content["numpy"]))


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _as_text(value: object) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by text."""
    if isinstance(value, Mapping):
        return {name: _as_text(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_numbers(value: object) -> Any:
    """Undo `_as_text`."""
    if isinstance(value, Mapping):
        return {name: _as_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_as_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
