"""The tensors of a sharded run on the disk and back, by torch.distributed.checkpoint.

    shards/     the trained parameters, buffers and the optimizer's tensors: a file of each process with what it holds
    model/      the whole model as transformers or peft read it, gathered by the first process in its host's memory

All processes write at the same time and the training waits. What fails in one of them is a failed save in all. The
files can be read by another number of processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel

from fitune.distributed.sharding import AbortedError, Shards
from fitune.errors import RunDirectoryError
from fitune.machine.out_of_memory import said_of
from fitune.model.peft_parts import PeftModel
from fitune.model.save import saved_tensors
from fitune.model.tensor_file import write_tensors

T = TypeVar("T")
SHARDS = "shards"


@dataclass(frozen=True)
class ShardedTensors:
    """What is saved of a commit. tensors: by the names that they have in the checkpoint."""

    model: PreTrainedModel | PeftModel
    shards: Shards
    tensors: Mapping[str, torch.Tensor]
    optimizer_scalars: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all processes' files together."""
        parameters = list(self.model.parameters())
        saved = [p for p in parameters if p.requires_grad] if isinstance(self.model, PeftModel) else parameters
        return sum(t.numel() * t.element_size() for t in (*saved, *self.tensors.values()))

    def write(self, directory: Path, *, begin: Callable[[], None]) -> dict[str, str]:
        """Path in the directory -> hash, of the first process's file. begin: makes the directory; done by the first
        process. All processes call this. Raises RunDirectoryError in all."""
        leads = self.shards.peers.rank == 0
        self._agreed(begin if leads else lambda: None)
        state = self._agreed(self._whole_state)
        hashes = self._agreed(lambda: self._write_model(directory / "model", state) if leads else {})
        try:
            save(dict(self.tensors), storage_writer=FileSystemWriter(directory / SHARDS))
        except CheckpointException as error:  # in all processes
            raise RunDirectoryError(_first(error)) from error
        return hashes

    def _write_model(self, directory: Path, state: dict[str, torch.Tensor]) -> dict[str, str]:
        directory.mkdir(parents=True)
        name, tensors = saved_tensors(self.model, state=state)
        return {f"model/{name}": write_tensors(directory / name, tensors)}

    def _agreed(self, action: Callable[[], T]) -> T:
        """Where it fails in one process it fails in all."""
        fault, results = None, []
        try:
            results.append(action())
        except AbortedError:
            pass  # another one has more to say
        except Exception as error:  # of whatever kind: the others wait to be told
            fault = said_of(error)
        faults = [each for each in self.shards.peers.exchange(fault) if each is not None]
        if faults:
            raise RunDirectoryError(faults[0])
        return results[0]

    def _whole_state(self) -> dict[str, torch.Tensor]:
        """The model's state dictionary, of adapters their part; nothing but in the first process. One parameter at a
        time is whole on the device."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        wholes: dict[int, torch.Tensor] = {}
        state = {}
        with self.shards.announced():
            for name, tensor in self.model.state_dict().items():
                parameter = parameters.get(name, tensor)
                if isinstance(self.model, PeftModel) and not parameter.requires_grad:
                    continue
                if id(parameter) not in wholes:
                    whole = self.shards.whole(parameter.detach())
                    wholes[id(parameter)] = whole.cpu() if self.shards.peers.rank == 0 else whole.new_empty(0)
                state[name] = wholes[id(parameter)]
        return state if self.shards.peers.rank == 0 else {}


def read_shards(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Into these tensors, in all processes. Raises RunDirectoryError where one of them is not there."""
    try:
        load(dict(tensors), storage_reader=FileSystemReader(directory))
    except CheckpointException as error:
        raise RunDirectoryError(f"{directory} does not hold this model and optimizer: {_first(error)}") from error


def _first(error: CheckpointException) -> str:
    fault, _ = next(iter(error.failures.values()))
    return " ".join(str(fault).split())[:200]
