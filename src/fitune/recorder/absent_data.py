"""Stand in for data and weights that a script reads and that are not on this machine.

A prediction needs shapes alone. Each use is named in the assumptions of the prediction.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from fitune.errors import UsageError
from fitune.recorder.absent_datasets import (
    LONG_TEXT,
    NUM_SAMPLES,
    QUESTION,
    equal_samples,
    filters_keep_the_longest,
    sample_of_trainer,
)
from fitune.recorder.library_patches import when_imported

#: Keys of a sample whose value is a list of messages
_CONVERSATIONS = ("conversations", "messages", "conversation", "chosen", "rejected")
#: Keys of a sample whose value is text, of what is asked and of all else
_QUESTIONS = ("prompt", "instruction", "input", "question", "query", "system")
_TEXTS = (
    *("text", "content", "completion", "response", "output", "answer"),
    *("article", "document", "story", "code"),
)
_NUM_ROWS = 100_000
#: Numbers in place of a file of token ids
_NUM_TOKENS = 2**24

#: Adds an assumption to the prediction
Note = Callable[[str], None]


@contextmanager
def absent_data(note: Note) -> Iterator[None]:
    """Let the script of this block read files that are not here."""
    with ExitStack() as stack:
        stack.enter_context(_weights(note))
        stack.enter_context(_token_files(note))
        stack.enter_context(
            when_imported(
                {
                    "datasets": lambda module: _datasets(module, note),
                    # asks the hub first, which is not here
                    "axolotl.utils.data.shared": lambda module: patch.object(
                        module, "_check_if_hub_dataset", lambda *_, **__: True
                    ),
                    "transformers.tokenization_utils_base": _equal_texts_tokenised_once,
                }
            )
        )
        yield


class AbsentRow(dict[str, object]):
    """A sample of a file that is not here; each key has a value that fits its name."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def __missing__(self, key: str) -> object:
        if key in _CONVERSATIONS:
            return [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": LONG_TEXT},
            ]
        # an answer that is cut off would leave nothing to train on
        if key in _QUESTIONS:
            return QUESTION
        if key in _TEXTS:
            return LONG_TEXT
        raise UsageError(
            f"{self._source} is not here, and the script asks its samples for '{key}', whose form "
            "is not known: put a file with one line of it there"
        )

    def get(self, key: str, default: object = None) -> Any:
        return self[key] if key in (*_CONVERSATIONS, *_QUESTIONS, *_TEXTS) else default

    def __reduce__(self) -> Any:
        return AbsentRow, (self._source,)


class AbsentBatch(AbsentRow):
    """A batch of one such sample: each key has a list."""

    def __missing__(self, key: str) -> object:
        return [super().__missing__(key)]

    def get(self, key: str, default: object = None) -> object:
        value = super().get(key, default)
        return [value] if value is default else value


class AbsentRows(Dataset[AbsentRow]):
    """The samples of a file that is not here.

    What a script does with all of them at once is done with one, which then stands for all.
    """

    def __init__(self, source: str) -> None:
        self._source = source

    def __len__(self) -> int:
        return _NUM_ROWS

    def __getitem__(self, index: object) -> Any:
        row = AbsentRow(self._source)
        return [row[index]] * NUM_SAMPLES if isinstance(index, str) else row

    def __iter__(self) -> Iterator[AbsentRow]:
        return (AbsentRow(self._source) for _ in range(_NUM_ROWS))

    def __del__(self) -> None: ...

    def __repr__(self) -> str:
        return f"AbsentRows({self._source!r})"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UsageError(
            f"{self._source} is not here, and the script does more with it than to read its "
            f"samples (.{name}): put a file with a few lines there"
        )


def _absent_dataset(module: Any) -> type[AbsentRows]:
    """Return `AbsentRows` that pass as a `datasets.Dataset`. module: the module datasets."""

    class AbsentDataset(AbsentRows, module.Dataset):  # type: ignore[misc]
        """The samples of a data set that is not here."""

        #: the true columns are known by what a function reads of a sample, and scripts that ask
        #: for them take the first one where there is no text
        column_names: object = property(lambda _: ["text"])
        features: object = property(lambda _: {"text": module.Value("string")})
        num_rows: object = property(len)

        def map(self, function: Any, *_: object, **options: Any) -> object:
            batched, columns = options.get("batched"), options.get("input_columns")
            row = AbsentBatch(self._source) if batched else AbsentRow(self._source)
            names = [columns] if isinstance(columns, str) else columns
            given: list[object] = [row] if names is None else [row[name] for name in names]
            if options.get("with_indices"):
                given.append([0] if batched else 0)
            made = function(*given, **options.get("fn_kwargs") or {})
            if not made:
                return self
            sample = {name: value[0] if batched else value for name, value in made.items()}
            return equal_samples(module, sample)

        def _itself(self, *_: object, **__: object) -> object:
            return self

        filter = shuffle = select = take = skip = flatten_indices = with_format = _itself
        select_columns = remove_columns = cast = cast_column = _itself

        def train_test_split(self, *_: object, **__: object) -> object:
            return module.DatasetDict(train=self, test=self)

    return AbsentDataset


class AbsentWeights(dict[str, object]):
    """The content of a file of weights that is not here; it fits every model."""

    def __missing__(self, key: str) -> object:
        return AbsentWeights()

    def get(self, key: str, default: object = None) -> Any:
        return default


@contextmanager
def _weights(note: Note) -> Iterator[None]:
    """Let torch.load return weights that fit every model where the file is not here."""
    load, load_into_module = torch.load, nn.Module.load_state_dict
    load_into_optimizer = torch.optim.Optimizer.load_state_dict

    def load_or_absent(file: Any, *arguments: Any, **options: Any) -> object:
        if isinstance(file, (str, os.PathLike)) and not os.path.exists(file):
            note(f"assumed: {os.fspath(file)}, which is not here, holds weights that fit the model")
            return AbsentWeights()
        return load(file, *arguments, **options)

    def load_module(self: nn.Module, state_dict: Any, *arguments: Any, **options: Any) -> object:
        if isinstance(state_dict, AbsentWeights):
            return nn.modules.module._IncompatibleKeys([], [])
        return load_into_module(self, state_dict, *arguments, **options)

    def load_optimizer(self: torch.optim.Optimizer, state_dict: Any) -> None:
        if not isinstance(state_dict, AbsentWeights):
            load_into_optimizer(self, state_dict)

    with (
        patch.object(torch, "load", load_or_absent),
        patch.object(nn.Module, "load_state_dict", load_module),
        patch.object(torch.optim.Optimizer, "load_state_dict", load_optimizer),
    ):
        yield


@contextmanager
def _token_files(note: Note) -> Iterator[None]:
    """Let numpy.memmap and numpy.fromfile return zeros where the file is not here."""

    memmap, fromfile = np.memmap, np.fromfile

    def zeros(file: object, dtype: object) -> Any:
        if not isinstance(file, (str, os.PathLike)) or os.path.exists(file):
            return None
        note(f"assumed: {os.fspath(file)}, which is not here, holds {_NUM_TOKENS:,} tokens")
        return np.zeros(_NUM_TOKENS, dtype)

    class MemoryMap(memmap):  # type: ignore[misc, valid-type]
        """numpy.memmap, which is a class that libraries name in annotations."""

        def __new__(cls, filename: Any, dtype: Any = np.uint8, *args: Any, **options: Any) -> Any:
            absent = zeros(filename, dtype)
            return memmap(filename, dtype, *args, **options) if absent is None else absent

    def from_file(file: Any, dtype: Any = float, *args: Any, **options: Any) -> object:
        absent = zeros(file, dtype)
        return fromfile(file, dtype, *args, **options) if absent is None else absent

    with patch.object(np, "memmap", MemoryMap), patch.object(np, "fromfile", from_file):
        yield


@contextmanager
def _datasets(module: Any, note: Note) -> Iterator[None]:
    """Let load_dataset of the package datasets return samples where the file is not here."""
    load_dataset, absent_rows = module.load_dataset, _absent_dataset(module)

    def load_or_absent(path: str, *arguments: object, **options: object) -> object:
        files = options.get("data_files")
        wanted = list(files.values()) if isinstance(files, dict) else files
        names = wanted if isinstance(wanted, list) else [path if wanted is None else wanted]
        absent = [each for each in names if isinstance(each, str) and not os.path.exists(each)]
        if not absent:
            return load_dataset(path, *arguments, **options)
        if wanted is None:
            try:
                return load_dataset(path, *arguments, **options)  # from the hub's cache
            except Exception:
                absent = [path]
        source = absent[0]
        note(
            f"assumed: the samples of {source}, which is not here, are as long as the script keeps"
        )
        sample = sample_of_trainer()
        rows: Any = absent_rows(source) if sample is None else equal_samples(module, sample)
        if sample is not None and options.get("streaming"):
            rows = rows.to_iterable_dataset()
        if options.get("split"):
            return rows
        return module.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    with (
        patch.object(module, "load_dataset", _alone(load_or_absent)),
        patch.object(module.Dataset, "map", _alone(module.Dataset.map)),
        patch.object(module.Dataset, "filter", _alone(module.Dataset.filter)),
        patch.object(module.Dataset, "save_to_disk", _alone(module.Dataset.save_to_disk)),
        filters_keep_the_longest(module),
    ):
        yield


def _alone(call: Callable[..., object]) -> Callable[..., object]:
    """Return a function of datasets that starts no processes of its own."""

    def call_alone(*arguments: object, **options: object) -> object:
        if options.get("num_proc") is not None:
            options["num_proc"] = None
        return call(*arguments, **options)

    return call_alone


def _are_equal(texts: object) -> bool:
    """Return whether these are several long texts, all of them the same."""
    return (
        isinstance(texts, list)
        and len(texts) > 1
        and isinstance(texts[0], str)
        and len(texts[0]) >= len(LONG_TEXT)
        and all(text == texts[0] for text in texts)
    )


def _equal_texts_tokenised_once(tokenization: Any) -> AbstractContextManager[object]:
    """Let a tokenizer remember long texts: samples that are not here are all alike."""
    call = tokenization.PreTrainedTokenizerBase.__call__
    known: dict[object, Any] = {}

    def call_once(self: object, text: Any = None, *arguments: object, **options: object) -> object:
        if _are_equal(text) and not options.get("return_tensors"):
            once = call(self, text[:1], *arguments, **options)
            once.data = {name: list(value) * len(text) for name, value in once.data.items()}
            return once
        if not isinstance(text, str) or len(text) < len(LONG_TEXT):
            return call(self, text, *arguments, **options)
        key = (id(self), text, repr(arguments), repr(sorted(options.items())))
        if key not in known:
            known[key] = call(self, text, *arguments, **options)
        copied = copy.copy(known[key])
        copied.data = {
            name: list(value) if isinstance(value, list) else value
            for name, value in known[key].data.items()
        }
        return copied

    return patch.object(tokenization.PreTrainedTokenizerBase, "__call__", call_once)
