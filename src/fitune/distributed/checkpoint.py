"""Save the tensors of a sharded run to disk and read them back, by torch.distributed.checkpoint.

    shards/     trained parameters, buffers and optimizer tensors; each process writes its parts
    model/      the whole model as transformers or peft load it, gathered in the first process's
                host memory

All processes write at the same time, and training waits for them. If the save fails in one process,
it fails in all. A different number of processes can read the files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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
    """What one checkpoint of a sharded run saves."""

    model: PreTrainedModel | PeftModel
    shards: Shards
    #: by name in the checkpoint
    tensors: Mapping[str, torch.Tensor]
    optimizer_scalars: dict[str, object]

    @property
    def num_bytes(self) -> int:
        """Return the size of all processes' files together."""
        parameters = list(self.model.parameters())
        saved = (
            [p for p in parameters if p.requires_grad]
            if isinstance(self.model, PeftModel)
            else parameters
        )
        return sum(t.numel() * t.element_size() for t in (*saved, *self.tensors.values()))

    def write(self, directory: Path, *, begin: Callable[[], None]) -> dict[str, str]:
        """Write the checkpoint; all processes call this.

        Returns the hash of each file that this process wrote, by path in the directory; empty for
        all but the first process. Raises RunDirectoryError in all processes if one fails.

        begin: creates the directory; called in the first process only.
        """
        leads = self.shards.peers.rank == 0
        self._agreed(begin if leads else lambda: None)
        state = self._agreed(self._whole_state)
        hashes = self._agreed(
            lambda: self._write_model(directory / "model", state) if leads else {}
        )
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
        """Return action(). If it fails in one process, raise RunDirectoryError in all of them."""
        fault, results = None, []
        try:
            results.append(action())
        except AbortedError:
            pass  # the process that failed reports the reason
        except Exception as error:  # of any kind: the others wait for this process's report
            fault = said_of(error)
        faults = [each for each in self.shards.peers.exchange(fault) if each is not None]
        if faults:
            raise RunDirectoryError(faults[0])
        return results[0]

    def _whole_state(self) -> dict[str, torch.Tensor]:
        """Gather the model's state dictionary in the first process; the others return an empty one.

        For a peft model it holds the trained parameters only. One parameter at a time is whole on
        the device.
        """
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
                    wholes[id(parameter)] = (
                        whole.cpu() if self.shards.peers.rank == 0 else whole.new_empty(0)
                    )
                state[name] = wholes[id(parameter)]
        return state if self.shards.peers.rank == 0 else {}


def read_shards(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read the shards into these tensors, in all processes.

    Raises RunDirectoryError if one of them is missing.
    """
    try:
        load(dict(tensors), storage_reader=FileSystemReader(directory))
    except CheckpointException as error:
        raise RunDirectoryError(
            f"{directory} does not hold this model and optimizer: {_first(error)}"
        ) from error


def _first(error: CheckpointException) -> str:
    fault, _ = next(iter(error.failures.values()))
    return " ".join(str(fault).split())[:200]
