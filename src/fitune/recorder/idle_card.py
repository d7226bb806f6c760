"""Let PyTorch answer queries about the GPU as if the target card were there, idle and empty.

The answers hold while a step is recorded, and CUDA itself is never called. Libraries query
torch.cuda and torch.accelerator. Both end in functions of torch._C, whose first call would start
CUDA: that takes a context's memory on a machine with a card, and fails on one without. So the
functions of torch._C are replaced too, including those that a CPU build of PyTorch lacks.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.checkpoint import DefaultDeviceType

from fitune.errors import UsageError
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.library_patches import is_library_import

#: (stream, device, device type) of the default stream, as PyTorch represents it
_CARD_0 = (0, 0, 1)
#: Functions of torch._C that are not replaced: they describe the process or the build, whatever the
#: card, and do not start CUDA
_NOT_REPLACED = (
    *(
        "_cuda_isInBadFork",
        "_cuda_getCompiledVersion",
        "_cuda_getArchFlags",
        "_cuda_getAllocatorBackend",
    ),
    *("_cuda_get_cudnn_benchmark_limit", "_cuda_set_cudnn_benchmark_limit"),
)
#: Functions of torch._C that do nothing and return None
_NO_EFFECT = (
    *("_accelerator_setDeviceIndex", "_accelerator_setStream", "_accelerator_synchronizeDevice"),
    *(
        "_accelerator_resetAccumulatedStats",
        "_accelerator_resetPeakStats",
        "_accelerator_emptyCache",
    ),
    *(
        "_accelerator_emptyHostCache",
        "_cuda_setDevice",
        "_cuda_setStream",
        "_cuda_synchronize",
        "_cuda_sleep",
    ),
    *("_cuda_emptyCache", "_cuda_resetPeakMemoryStats", "_cuda_resetAccumulatedMemoryStats"),
    *(
        "_cuda_clearCublasWorkspaces",
        "_cuda_set_sync_debug_mode",
        "_cuda_attach_out_of_memory_observer",
    ),
    *("_cuda_record_memory_history", "_cuda_setMemoryFraction", "_cuda_ipc_collect"),
)
#: function of torch._C -> its return value; functions of a CUDA build that are not named here
#: return None as well
_ANSWERS: dict[str, object] = {
    **dict.fromkeys(_NO_EFFECT),
    "_accelerator_getAccelerator": torch.device("cuda"),
    "_accelerator_getDeviceIndex": 0,
    "_accelerator_exchangeDevice": 0,
    "_accelerator_maybeExchangeDevice": 0,
    "_accelerator_hooks_device_count": 1,
    "_accelerator_hooks_exchange_device": 0,
    "_accelerator_hooks_get_current_device": 0,
    "_accelerator_hooks_maybe_exchange_device": 0,
    "_accelerator_isAllocatorInitialized": True,
    "_accelerator_getDeviceStats": {},
    "_cuda_getDeviceCount": 1,
    "_cuda_getDevice": 0,
    "_cuda_exchangeDevice": 0,
    "_cuda_maybeExchangeDevice": 0,
    "_cuda_getCurrentStream": _CARD_0,
    "_cuda_getDefaultStream": _CARD_0,
    "_cuda_getStreamFromExternal": _CARD_0,
    "_cuda_getCurrentRawStream": 0,
    "_cuda_getCurrentBlasHandle": 0,
    "_cuda_getCurrentSolverHandle": 0,
    "_cuda_get_sync_debug_mode": 0,
    "_cuda_hasPrimaryContext": True,
    "_cuda_isCurrentStreamCapturing": False,
    "_cuda_isHistoryEnabled": False,
    "_cuda_canDeviceAccessPeer": False,
    "_cuda_getMemoryFraction": 1.0,
    "_cuda_memoryStats": {},
    "_cuda_hostMemoryStats": {},
    "_cuda_memorySnapshot": {"segments": [], "device_traces": []},
}


@contextmanager
def cuda_answers(target: CudaTarget) -> Iterator[None]:
    """Answer as if the target card were there, for as long as the block lasts.

    The answers are those of torch.cuda, torch.accelerator and the functions of torch._C below them.
    """
    capability = target.compute_capability
    properties = SimpleNamespace(
        name=target.name, major=capability[0], minor=capability[1], total_memory=target.total_bytes
    )
    free_and_total = (target.total_bytes, target.total_bytes)
    answers: dict[str, object] = {
        "is_initialized": True,
        "is_bf16_supported": capability >= (8, 0),
        "is_tf32_supported": capability >= (8, 0),
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": target.name,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "mem_get_info": free_and_total,
        "memory_stats": defaultdict(int),
        "memory_summary": "",
        **dict.fromkeys(
            ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate"), 0
        ),
        "cudart": _Runtime(),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), 0),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), 0),
        **dict.fromkeys(("synchronize", "set_device", "init", "ipc_collect")),
        **dict.fromkeys(("set_per_process_memory_fraction", "reset_peak_memory_stats")),
        **dict.fromkeys(("reset_max_memory_allocated", "reset_accumulated_memory_stats")),
        "check_error": None,
    }
    torch_c_answers = dict.fromkeys(filter(_is_function_of_the_card, dir(torch._C)))
    torch_c_answers |= _ANSWERS | {
        "_accelerator_getMemoryInfo": free_and_total,
        "_accelerator_getStream": _Stream(),
    }
    with ExitStack() as stack:
        for name, answer in torch_c_answers.items():
            stack.enter_context(patch.object(torch._C, name, partial(_answer, answer), create=True))
        for name, answer in answers.items():
            for module in (torch.cuda, torch.cuda.memory, torch.cuda.random):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, partial(_answer, answer)))
        for module in (torch.cuda, torch.accelerator):
            stack.enter_context(patch.object(module, "is_available", _is_available))
        # Code that seeds the card seeds this generator, and the CPU's random state is unchanged.
        stack.enter_context(patch.object(torch.cuda, "default_generators", (torch.Generator(),)))
        for name in ("range_push", "range_pop", "mark"):
            stack.enter_context(patch.object(torch.cuda.nvtx, name, partial(_answer, 0)))
        for module in (torch, torch.cuda):
            stack.enter_context(patch.object(module, "Event", _Event))
            stack.enter_context(patch.object(module, "Stream", _Stream))
        for name in ("CUDAGraph", "graph"):
            stack.enter_context(patch.object(torch.cuda, name, _RefusedGraph))
        stack.enter_context(patch.object(torch.cuda, "make_graphed_callables", _RefusedGraph))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(
                patch.object(torch, name, partial(_query_cpu, getattr(torch, name)))
            )
        stack.enter_context(_caches_cleared())
        yield


def _is_function_of_the_card(name: str) -> bool:
    prefixes = ("_cuda_", "_accelerator_", "_host_")
    return (
        name.startswith(prefixes)
        and name not in _NOT_REPLACED
        and not isinstance(getattr(torch._C, name), type)
    )


def _is_available() -> bool:
    """Return True, except to libraries that are being imported.

    A library that finds a card while it is imported looks for CUDA's own libraries. The user's own
    modules find the card.
    """
    return not is_library_import()


@contextmanager
def _caches_cleared() -> Iterator[None]:
    """Clear what transformers and torch.utils.checkpoint cached about the device in this block."""
    before = {id(each): each.cache_info().misses for each in _cached_by_transformers()}
    with patch.object(DefaultDeviceType, "_default_device_type", "cuda"):
        try:
            yield
        finally:
            for each in _cached_by_transformers():
                if each.cache_info().misses != before.get(id(each), 0):
                    each.cache_clear()


def _cached_by_transformers() -> list[Any]:
    """Return the functions with which transformers looks for devices and packages, if imported."""
    module = sys.modules.get("transformers.utils.import_utils")
    return [] if module is None else [e for e in vars(module).values() if hasattr(e, "cache_info")]


def _answer(value: object, *_: object, **__: object) -> Any:
    return value


def _query_cpu(query: Callable[[str], object], device_type: str = "cuda") -> object:
    return query("cpu" if device_type == "cuda" else device_type)


class _RefusedGraph:
    """A CUDA graph; a class, since libraries name it in annotations."""

    def __init__(self, *_: object, **__: object) -> None:
        raise UsageError(
            "the loop captures a CUDA graph, which keeps its memory in a pool of its own and is "
            "not predicted: predict the loop without it, which needs no more than with it but for "
            "that pool"
        )


class _Runtime:
    """CUDA's runtime functions, as torch.cuda.cudart() returns them; all succeed and do nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return partial(_answer, 0)


class _Event:
    """A CUDA event that has already happened."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0  # milliseconds


class _Stream:
    """A CUDA stream without pending work."""

    stream_id, device_index, device_type = _CARD_0
    cuda_stream = native_handle = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False
