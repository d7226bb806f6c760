"""Provide the flash-attn package for recordings on a machine that does not have it.

`attn_implementation="flash_attention_2"` and a loop's own `from flash_attn import flash_attn_func`
get the functions of this module. They call the kernels that PyTorch adopted from that package: the
backward needs the same saved tensors and the same temporaries (csrc/flash_attn/flash_api.cpp of
both).
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

from fitune.errors import UsageError
from fitune.recorder.cuda_attention import flash_attention
from fitune.recorder.cuda_target import CudaTarget

#: The version of flash-attn whose functions these are
_VERSION = "2.8.3"


@contextmanager
def flash_package(target: CudaTarget) -> Iterator[None]:
    """Make flash-attn importable in this block, and make transformers accept it.

    The latter is needed where transformers' models have been imported already.
    """
    if find_spec("flash_attn") is not None:
        yield
        return
    helpers: Any = sys.modules.get("transformers.modeling_flash_attention_utils")
    with ExitStack() as stack:
        stack.enter_context(_distributed())
        for module in _modules(target):
            sys.modules[module.__name__] = module
            # Only these modules are removed: others that the block imports stay imported.
            stack.callback(sys.modules.pop, module.__name__)
        if helpers is not None:
            stack.enter_context(patch.object(helpers, "is_flash_attn_2_available", _available))
            stack.enter_context(patch.object(helpers, "_loaded_implementation", None))
            checks = helpers.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
            stack.enter_context(patch.dict(checks, general_availability_check=_available))
        yield


@contextmanager
def _distributed() -> Iterator[None]:
    """Let the package have a distribution, by which versions of transformers look for it."""
    find = importlib.metadata.packages_distributions
    known = {"flash_attn": ["flash-attn"]}
    imported: Any = sys.modules.get("transformers.utils.import_utils")
    mapping = getattr(imported, "PACKAGE_DISTRIBUTION_MAPPING", {})
    with (
        patch.dict(mapping, known),
        patch.object(importlib.metadata, "packages_distributions", lambda: {**find(), **known}),
    ):
        yield


def _available(**_: object) -> bool:
    return True


def _modules(target: CudaTarget) -> Iterator[ModuleType]:
    def refuse_older_cards() -> None:
        if target.compute_capability < (8, 0):
            major, minor = target.compute_capability
            raise UsageError(
                f"flash-attn needs compute capability 8.0, but this card has {major}.{minor}: choose sdpa or eager"
            )

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        """Run flash attention of q: [B, S, H, D]; k and v may have fewer heads."""
        refuse_older_cards()
        heads_first = (part.transpose(1, 2) for part in (q, k, v))
        return flash_attention(
            *heads_first, dropout=dropout_p, is_causal=causal, scale=softmax_scale
        ).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> object:
        """Run flash attention of packed samples, q: [T, H, D]; k and v may have fewer heads."""
        refuse_older_cards()
        from torch.nn.attention.varlen import varlen_attn

        window = (window_size[0], 0) if causal else window_size
        lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
        return varlen_attn(
            q, k, v, *lengths, scale=softmax_scale, window_size=window, enable_gqa=True
        )

    package = _module(
        "flash_attn",
        __version__=_VERSION,
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    package.__path__ = []
    yield package
    yield _module(
        "flash_attn.bert_padding",
        **{
            name: _of_transformers(name)
            for name in ("pad_input", "unpad_input", "index_first_axis")
        },
    )


def _of_transformers(name: str) -> Callable[..., object]:
    """Return a function of flash_attn.bert_padding as transformers has it, once it is called."""

    def call(*arguments: object, **options: object) -> object:
        module = importlib.import_module("transformers.modeling_flash_attention_utils")
        return getattr(module, f"_{name}")(*arguments, **options)

    return call


def _module(name: str, **content: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(content)
    return module
