"""Make libraries that a script uses behave without weights, network and trackers.

Libraries whose kernels are not PyTorch's are refused, since their memory is not known.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader

from fitune.errors import UsageError
from fitune.recorder.absent_data import Note
from fitune.recorder.absent_datasets import GENERATES, refuse_uncut
from fitune.recorder.library_patches import LIBRARIES, OWN_PACKAGES, when_imported
from fitune.recorder.triton_kernels import triton_kernels

_TRACKERS = ("wandb", "swanlab", "trackio", "comet_ml", "mlflow", "neptune", "clearml", "aim")
#: Packages whose memory is not known -> their names in a message
_REFUSED = {
    "unsloth": "Unsloth's kernels",
    "deepspeed": "DeepSpeed",
    "vllm": "vLLM",
    "megatron": "Megatron's kernels",
    "transformer_engine": "Transformer Engine's kernels",
}
#: What PyTorch's present releases are built for
_CUDA_VERSION = "13.0"
_NCCL_VERSION = (2, 28, 9)


@contextmanager
def script_libraries(note: Note, *, longest: bool) -> Iterator[None]:
    """Let the libraries of this block need nothing that is not here.

    note: is called with each assumption that is made.
    longest: whether a DataLoader over tokenised samples begins with the longest ones.
    """
    with ExitStack() as stack:
        stack.enter_context(_trackers_do_nothing(note))
        stack.enter_context(_kernel_libraries_refused())
        stack.enter_context(_saves_touch_files())
        stack.enter_context(_one_process())
        stack.enter_context(_built_for_cuda())
        if longest:
            stack.enter_context(_longest_samples_first(note))
        stack.enter_context(
            when_imported(
                {
                    "transformers.utils.import_utils": _card_is_asked_each_time,
                    "transformers.generation.utils": _generation_of_trainers,
                    "transformers.modeling_utils": lambda module: models_of_configs(module, note),
                    "bitsandbytes.functional": _state_in_managed_memory,
                    "evaluate": lambda module: _metrics_of_hub(module, note),
                    "kernels": lambda module: patch.object(
                        module, "get_kernel", lambda name, *_, **__: _hub_kernel(name, note)
                    ),
                }
            )
        )
        stack.enter_context(triton_kernels())
        yield


# ---- models ----


def models_of_configs(
    modeling: Any, note: Note, *, has_card: bool = True
) -> AbstractContextManager[object]:
    """Let from_pretrained build the model of its configuration, and read no weights.

    modeling: the module transformers.modeling_utils.
    has_card: whether a model whose device_map is not the host goes to the card.
    """

    def from_pretrained(
        cls: Any, /, name: object, *_: object, config: Any = None, **options: object
    ) -> object:
        _refuse_quantised(options)
        if config is None or isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(name if config is None else config)
        config.name_or_path = str(name)
        for key in [key for key in options if hasattr(config, key) and key not in _MODEL_OPTIONS]:
            setattr(config, key, options[key])
        if getattr(config, "quantization_config", None) is not None:
            _refuse_quantised({"quantization_config": config.quantization_config})
        attention = options.get("attn_implementation")
        chosen = {} if attention is None else {"attn_implementation": attention}
        dtype = _dtype(options.get("dtype", options.get("torch_dtype")), config)
        # the dtype of the configuration would win over the default one
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
        note(f"{name}: built from its configuration, no weights are read")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = cls._from_config(config, **chosen)
        finally:
            torch.set_default_dtype(before)
        model.eval()
        place = options.get("device_map")
        if has_card and place not in (None, "cpu"):
            warms_up = hasattr(modeling, "caching_allocator_warmup")
            _load_onto_card(model, warms_up=warms_up, is_planned=isinstance(place, str))
        return model

    return patch.object(modeling.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


def _load_onto_card(model: torch.nn.Module, *, warms_up: bool, is_planned: bool) -> None:
    """Move the model as transformers loads weights onto a card, which makes other segments.

    Sources: modeling_utils.py, caching_allocator_warmup, core_model_loading.py, and get_max_memory
    of accelerate.

    warms_up: whether one allocation of the size of all weights comes first
    is_planned: whether accelerate asks the card for its memory, as with device_map="auto"
    """
    # a tied weight is stored under the first of its names
    named = reversed(model.state_dict(keep_vars=True).items())
    weights = {id(weight): (name, weight) for name, weight in named}
    if warms_up:
        num_bytes = sum(weight.nbytes for _, weight in weights.values())
        if is_planned:
            torch.tensor([0], device="cuda")
            # what is left of the segment counts as there already
            num_bytes -= min(_SMALL_SEGMENT_BYTES, num_bytes)
        torch.empty(num_bytes // 2, dtype=torch.float16, device="cuda")
    for _, weight in sorted(weights.values(), key=lambda named: _natural_key(named[0])):
        weight.data = weight.data.to("cuda")
    model.to("cuda")


_SMALL_SEGMENT_BYTES = 2**21


def _natural_key(name: str) -> list[tuple[str, int]]:
    """Sort layers.2 before layers.10."""
    return [("", int(part)) if part.isdigit() else (part, 0) for part in name.split(".")]


#: Arguments of from_pretrained that are no settings of the model's configuration
_MODEL_OPTIONS = ("dtype", "torch_dtype", "attn_implementation", "device_map")


def _dtype(named: object, config: object) -> torch.dtype:
    if named is None:
        # transformers 5 loads in the dtype of the weights, earlier versions in float32
        import transformers

        named = "auto" if int(transformers.__version__.partition(".")[0]) >= 5 else torch.float32
    if named == "auto":
        named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, named) if isinstance(named, str) else named
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _refuse_quantised(options: Mapping[str, object]) -> None:
    if any(options.get(key) for key in ("quantization_config", "load_in_4bit", "load_in_8bit")):
        raise UsageError(
            "the script loads a quantised model, whose weights are packed on the card: predict it "
            "with fitune plan MODEL model.method=qlora"
        )


def _generation_of_trainers(module: ModuleType) -> AbstractContextManager[object]:
    """Refuse what trainers of TRL generate to train on; other generation ends at its length."""
    generate = module.GenerationMixin.generate

    def of_script(model: object, *arguments: object, **options: object) -> object:
        packages = (
            str(frame.f_globals.get("__name__")).partition(".")[0]
            for frame, _ in traceback.walk_stack(sys._getframe(1))
        )
        # peft and torch pass the call of a wrapped model on
        if next(package for package in packages if package not in ("peft", "torch")) == "trl":
            raise UsageError(GENERATES)
        return generate(model, *arguments, **options)

    return patch.object(module.GenerationMixin, "generate", of_script)


def _metrics_of_hub(evaluate: ModuleType, note: Note) -> AbstractContextManager[object]:
    """Let evaluate.load return a metric that does nothing where the metric is not here."""
    load = evaluate.load

    def load_or_nothing(path: str, *arguments: object, **options: object) -> object:
        try:
            return load(path, *arguments, **options)
        except (OSError, ConnectionError):
            note(f"the metric {path}, which is not here, is not computed")
            return _Anything(path)

    return patch.object(evaluate, "load", load_or_nothing)


def _state_in_managed_memory(module: ModuleType) -> AbstractContextManager[object]:
    """Let paged optimizers have their state on the host: PyTorch's allocator never sees it."""

    def get_paged(*shape: int, dtype: torch.dtype, **_: object) -> object:
        state: Any = torch.zeros(shape, dtype=dtype, device="cpu")
        state.is_paged, state.page_deviceid = True, 0
        return state

    def nothing(*_: object, **__: object) -> None: ...

    return patch.multiple(module, get_paged=get_paged, fill=nothing, prefetch_tensor=nothing)


def _hub_kernel(name: str, note: Note) -> object:
    """Return the functions of a kernel of the hub. Raises UsageError for an unknown one."""
    if "flash-attn" not in name and "flash-attention" not in name:
        raise UsageError(
            f"the script loads the compiled kernel {name}, whose memory is not known: predict it "
            "with PyTorch's own attention"
        )
    flash_attn: object = importlib.import_module("flash_attn")
    note(f"{name}: allocates as PyTorch's flash attention")
    return SimpleNamespace(flash_attn_interface=flash_attn, **vars(flash_attn))


@contextmanager
def _card_is_asked_each_time(module: Any) -> Iterator[None]:
    """Let transformers cache no answer about the card: a library may ask while it is imported."""
    about_card = ("cuda", "bf16", "fp16", "tf32", "flash_attn")
    with ExitStack() as stack:
        for name, function in list(vars(module).items()):
            if hasattr(function, "cache_info") and any(word in name for word in about_card):
                stack.enter_context(patch.object(module, name, function.__wrapped__))
        yield


# ---- data loaders ----


@contextmanager
def _longest_samples_first(note: Note) -> Iterator[None]:
    """Let each batch of tokenised samples be of the longest ones.

    A sampler of the script's own that makes whole batches stays as it is.
    """
    init = DataLoader.__init__

    def heaviest_batches(
        self: Any, dataset: Any, batch_size: Any = 1, *arguments: Any, **options: Any
    ) -> None:
        lengths = None if arguments or options.get("batch_sampler") else _lengths(dataset)
        if lengths and isinstance(batch_size, int):
            order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
            heaviest = order[:batch_size]
            refuse_uncut(_tokens(dataset, order[0]))
            note(
                f"every batch has the {len(heaviest)} longest samples of {len(lengths):,}, the "
                f"longest of {lengths[order[0]]:,} tokens"
            )
            options["sampler"] = [heaviest[place % len(heaviest)] for place in range(len(order))]
            options.pop("shuffle", None)
        init(self, dataset, batch_size, *arguments, **options)

    with patch.object(DataLoader, "__init__", heaviest_batches):
        yield


def _lengths(dataset: object) -> list[int] | None:
    """Return the number of tokens of each sample, None if the data set does not show it."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "select_columns"):
        return None
    if not (ids := _columns_of_tokens(columns)):
        return None
    rows = dataset.select_columns(ids).with_format(None)
    return [sum(len(row[column]) for column in ids) for row in rows]


def _columns_of_tokens(columns: list[str]) -> list[str]:
    return [column for column in columns if column.endswith("input_ids")]


def _tokens(dataset: Any, place: int) -> list[int]:
    """Return all tokens of one sample."""
    row = dataset.with_format(None)[place]
    return [token for column in _columns_of_tokens(list(row)) for token in row[column]]


# ---- what leaves this machine, or stays on it ----


class _Anything(ModuleType):
    """A module, object or function that takes everything and does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *_: object, **__: object) -> object:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __setitem__(self, key: object, value: object) -> None: ...


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, find: Callable[[str], importlib.machinery.ModuleSpec | None]) -> None:
        self._find = find

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return self._find(fullname)


class _AnythingLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@contextmanager
def _finding(find: Callable[[str], importlib.machinery.ModuleSpec | None]) -> Iterator[None]:
    finder = _Finder(find)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _trackers_do_nothing(note: Note) -> AbstractContextManager[None]:
    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in _TRACKERS or not _is_imported_by_script(or_trainer=True):
            return None
        note(f"{name.partition('.')[0]} does nothing")
        return importlib.machinery.ModuleSpec(name, _AnythingLoader(), is_package=True)

    return _finding(find)


def _kernel_libraries_refused() -> AbstractContextManager[None]:
    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        if name in _REFUSED and _is_imported_by_script():
            raise UsageError(
                f"the script uses {_REFUSED[name]}, whose memory is not known here: fitune config "
                "import reads the settings of many trainers, and fitune plan predicts the same "
                "training without it"
            )
        return None

    return _finding(find)


def _is_imported_by_script(*, or_trainer: bool = False) -> bool:
    """Return whether the innermost import statement that runs is not a library's.

    or_trainer: whether a trainer that is installed counts as a script too
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        is_machinery = file.startswith("<frozen") or "importlib" in file or file == __file__
        if not is_machinery and not file.endswith("library_patches.py"):
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            is_own = or_trainer and package in OWN_PACKAGES
            return is_own or not LIBRARIES & set(Path(file).parts)
        frame = frame.f_back
    return False


@contextmanager
def _saves_touch_files() -> Iterator[None]:
    """Let torch.save and safetensors make an empty file, which the script may then move."""

    def touch(content: object, file: object, *_: object, **__: object) -> None:
        if isinstance(file, (str, os.PathLike)):
            open(file, "wb").close()

    with (
        patch.object(torch, "save", touch),
        when_imported(
            {
                "safetensors.torch": lambda module: patch.object(module, "serialize_file", touch),
                # its files are written by Rust, which knows of no scratch directory
                "transformers.tokenization_utils_base": lambda module: patch.object(
                    module.PreTrainedTokenizerBase, "save_pretrained", lambda *_, **__: ()
                ),
            }
        ),
    ):
        yield


@contextmanager
def _built_for_cuda() -> Iterator[None]:
    """Let a PyTorch that is built for the processor alone pass as one for CUDA.

    Trainers look for it before they take bfloat16.
    """
    with ExitStack() as stack:
        if torch.version.cuda is None:
            stack.enter_context(patch.object(torch.version, "cuda", _CUDA_VERSION))
            stack.enter_context(patch.object(torch.cuda.nccl, "version", lambda: _NCCL_VERSION))
        if torch.distributed.is_available():
            stack.enter_context(patch.object(torch.distributed, "is_nccl_available", lambda: True))
        yield


@contextmanager
def _one_process() -> Iterator[None]:
    """Raise UsageError where the script starts or joins several processes."""

    def refuse(*_: object, **__: object) -> object:
        raise UsageError(
            "the script trains in several processes, and a prediction is of one: start it without "
            "torchrun, or with --nproc_per_node=1"
        )

    with ExitStack() as stack:
        distributed = torch.distributed
        if distributed.is_available():
            stack.enter_context(patch.object(distributed, "init_process_group", refuse))
        stack.enter_context(patch.object(torch.multiprocessing, "spawn", refuse))
        yield
