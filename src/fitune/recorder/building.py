"""Build a model on the meta device: with its shapes but without its weights.

The weights may be larger than this machine's memory. Values that a constructor reads, such as the
length of a computed schedule or the indices of a mask, are computed if they follow from constants,
and assumed otherwise, as in a recorded loop. Weight files are read for their shapes only.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.recorder.assumptions import Assumptions
from fitune.recorder.card_stand_in import CARD, as_cpu
from fitune.recorder.known_data import known_array, set_factory_data
from fitune.recorder.library_patches import when_imported
from fitune.recorder.weight_files import weight_files

_META = torch.device("meta")
#: Factories that wrap existing memory, which cannot be on the meta device
_STORED = (torch.asarray, torch.frombuffer)
#: Parts of the names of factories whose values no constructor depends on
_WITHOUT_DATA = ("rand", "normal", "empty", "bernoulli", "multinomial")


@contextmanager
def building(assumptions: Assumptions) -> Iterator[None]:
    """Build the models of this block on the meta device, whatever devices they name.

    The program's own random state stays unchanged.
    """
    with ExitStack() as stack:
        stack.enter_context(when_imported({"transformers.modeling_utils": _reads_no_weights}))
        stack.enter_context(weight_files(lambda tensor, _: tensor.to("meta")))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_Reads(assumptions))
        stack.enter_context(torch.device(_META))
        stack.enter_context(OnMeta())
        yield


def _reads_no_weights(modeling: Any) -> AbstractContextManager[Any]:
    """Let from_pretrained of transformers.modeling_utils build models on the meta device."""
    from_pretrained: Callable[..., object] = modeling.PreTrainedModel.from_pretrained.__func__

    def shapes(cls: type, *args: Any, **options: Any) -> object:
        return from_pretrained(cls, *args, **(options | {"device_map": "meta"}))

    return patch.object(modeling.PreTrainedModel, "from_pretrained", classmethod(shapes))


class OnMeta(TorchFunctionMode):
    """A function mode that builds on the meta device what would be built on the card."""

    def __init__(self) -> None:
        super().__init__()
        self._constructors = _device_constructors()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in (Tensor.cuda, Tensor.cpu):
            return args[0]
        if func in (Tensor.numpy, Tensor.tolist) and args[0].is_meta:
            array = known_array(args[0])
            return array if func is Tensor.numpy else array.tolist()
        if func in _STORED:
            return func(*args, **(kwargs | {"device": CARD}))
        if func is Tensor.to:
            args = (args[0], *(_as_meta(value) for value in args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _as_meta(kwargs["device"])
        made = func(*args, **kwargs)
        if func in self._constructors and not any(word in func.__name__ for word in _WITHOUT_DATA):
            set_factory_data(made, func, args, kwargs)
        return made


class _Reads(TorchDispatchMode):
    """A dispatch mode that answers reads of tensors without data."""

    def __init__(self, assumptions: Assumptions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._assumptions = assumptions

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        return self._assumptions.call(func, args, kwargs or {})[0]


def _as_meta(value: Any) -> Any:
    return _META if as_cpu(value) is CARD or value == "cpu" else value
