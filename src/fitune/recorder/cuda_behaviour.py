"""Make the CPU tensors of a recording behave as CUDA tensors; each rule names its source.

`cuda_behaviour(target)` changes autocast's operator lists, the fused attention kernels, dropout and
the optimizers' foreach default for as long as a recording lasts. `CudaKernels` adds what the
kernels allocate without showing it to a dispatch mode (`cuda_kernels`). Sources are files of
PyTorch 2.13, unless another version is named.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from inspect import signature
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from fitune.recorder.allocation import Allocation
from fitune.recorder.cuda_attention import (
    MathAttention,
    scaled_dot_product_attention,
    with_grouped_heads,
)
from fitune.recorder.cuda_kernels import all_arguments, rule_of
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import Phase
from fitune.recorder.recorded_card import card_is_recorded
from fitune.recorder.shape_cache import Call

aten = torch.ops.aten
# torch.optim deletes its attribute `optimizer`, so the module must be imported by name.
_optimizer = import_module("torch.optim.optimizer")
_16_BIT = (torch.float16, torch.bfloat16)


# ---- autocast ----
# ATen/autocast_mode.h: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE. The CPU's
# lists are shorter.

_FLOAT32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "frobenius_norm.dim",
    "nuclear_norm",
    "nuclear_norm.dim",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
]
_FLOAT32_OUTPUT = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord",
    "sum",
    "sum.dim_IntList",
]
_PROMOTE = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
]


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _autocast_rules() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in _FLOAT32:
        yield name, _casting(_overload(name), lambda _: torch.float32)
    for name in _FLOAT32_OUTPUT:
        yield name, _with_float32_output(_overload(name))
    for name in _PROMOTE:
        yield name, _casting(_overload(name), _widest)
    for name in in_no_list_of_cuda():
        yield name, _not_casting(_overload(name))


def _casting(op: Any, dtype_of: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., object]:
    def kernel(*args: Any, **kwargs: Any) -> object:
        tensors = list(_float_tensors((args, tuple(kwargs.values()))))
        dtype = dtype_of(tensors) if tensors else torch.float32
        # The compilers of PyTorch's wheels evaluate the arguments of a call from the last one.
        of_keywords = {key: _cast(kwargs[key], dtype) for key in reversed(kwargs)}
        in_reverse = [_cast(value, dtype) for value in reversed(args)]
        with _without_autocast():
            return op(*reversed(in_reverse), **of_keywords)

    return kernel


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return (
        torch.float32
        if any(tensor.dtype == torch.float32 for tensor in tensors)
        else tensors[0].dtype
    )


def _with_float32_output(op: Any) -> Callable[..., object]:
    """Wrap an operator as fp32_set_opt_dtype does.

    Its kernel reads 16 bits and writes float32, unless the call names another dtype.
    """

    def kernel(*args: Any, **kwargs: object) -> object:
        names = [argument.name for argument in op._schema.arguments]
        positional = dict(zip(names, args, strict=False))
        if args[0].dtype in _16_BIT and kwargs.get("dtype", positional.get("dtype")) is None:
            kwargs["dtype"] = torch.float32
            args = tuple(value for name, value in positional.items() if name != "dtype")
        with _without_autocast():
            return op(*args, **kwargs)

    return kernel


@functools.cache
def in_no_list_of_cuda() -> tuple[str, ...]:
    """Return the operators that autocast changes on a CPU and leaves alone on CUDA, such as `cat`.

    A torch that was built without CUDA registers autocast for CUDA all the same.
    """
    listed = torch._C._dispatch_get_registrations_for_dispatch_key
    names = {*listed("AutocastCPU")} - {*listed("AutocastCUDA")}
    return tuple(name.removeprefix("aten::") for name in sorted(names) if name.startswith("aten::"))


def _not_casting(op: OpOverload) -> Callable[..., object]:
    consists_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), "CompositeImplicitAutograd"
    )

    def kernel(*args: Any, **kwargs: object) -> object:
        if consists_of_others:
            return op.decompose(*args, **kwargs)  # autocast applies to the parts
        with _without_autocast():
            return op(*args, **kwargs)

    return kernel


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    )


def _float_tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and tree.dtype != torch.float64:
            yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _float_tensors(item)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() and tree.dtype != torch.float64 else tree
    if isinstance(tree, (list, tuple)):
        return type(tree)(_cast(item, dtype) for item in tree)
    return tree


# ---- hidden allocations ----

_GEMMS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten._addmm_activation,
    aten.mv,
    aten.addmv,
    aten.dot,
}


_ADD, _LAYER_NORM = aten.add.Tensor, aten.native_layer_norm.default
#: No kernel splits its work for fewer elements. A rule without allocations at one such size
#: therefore has none at a similar size either.
_SMALL = 2**14
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default


class CudaKernels:
    """Runs operators and adds what CUDA's kernels do otherwise than the CPU's.

    inner: carries out an operator.
    """

    of_card = True

    def __init__(self, target: CudaTarget, inner: Callable[..., Any]) -> None:
        self.target = target
        self._inner = inner
        # A frozenset, so that a copy of this object is independent.
        self._threads_with_workspace: frozenset[bool] = frozenset()

    def call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, object]
    ) -> tuple[object, Call | None]:
        if (
            func is _ADD
            and MathAttention.runs
            and args[0].shape == torch.broadcast_shapes(*(a.shape for a in args))
        ):
            self._inner(aten.add_.Tensor, args, kwargs)
            return self._inner(aten.view.default, (args[0], args[0].shape), {})[0], None
        result, known = self._inner(func, args, kwargs)
        if func is _LAYER_NORM and result[1].dtype in _16_BIT:
            # cuda/layer_norm_kernel.cu: mean and rstd have acc_type, which is float32.
            result = (result[0], *(each.float() for each in result[1:]))
        elif func is _EFFICIENT_BACKWARD and result[1].shape != args[2].shape:
            result = with_grouped_heads(args, result)
        return result, known

    def workspaces(self, func: Any, phase: Phase) -> Sequence[int]:
        """Return the bytes of the cuBLAS workspace, if this operator is the first to need it.

        Sources: cuda/CUDABlas.cpp, CublasHandlePool.cpp. The first matrix product of each handle
        and stream allocates one workspace through the caching allocator, and the autograd thread
        has a handle of its own.
        """
        autograd_thread = phase == "backward"
        if autograd_thread in self._threads_with_workspace or func.overloadpacket not in _GEMMS:
            return ()
        self._threads_with_workspace |= {autograd_thread}
        return (self.target.generation.cublas_workspace_kib * 1024,)

    def forget_workspaces(self) -> None:
        self._threads_with_workspace = frozenset()

    def allocations(
        self, func: Any, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], Sequence[Allocation]] | None:
        """Return the operator's arguments and its allocation steps; None if no rule applies."""
        rule = rule_of(func)
        if rule is None:
            return None
        arguments = all_arguments(func, args, kwargs)
        if func is aten.index_put_.default and torch._C._current_graph_task_id() != -1:
            # The backward calls _index_put_impl_ with indices whose range the forward has checked.
            arguments = (*arguments, True)
        steps = rule(self.target, arguments)
        first = arguments[0]
        if not steps and isinstance(first, Tensor) and first.numel() < _SMALL:
            return None
        return arguments, steps


class CpuKernels:
    """Runs operators on the CPU; the same interface as `CudaKernels`, with nothing added."""

    of_card = False

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.call = inner

    def workspaces(self, func: Any, phase: Phase) -> Sequence[int]:
        return ()

    def forget_workspaces(self) -> None:
        pass

    def allocations(self, func: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        return None


# ---- replaced operators ----


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Run CUDA's fused dropout, which stores a mask of one byte per element (Dropout.cpp)."""
    if p == 0 or not train or not tensor.numel():
        return tensor
    dropped: Tensor = aten.native_dropout(tensor, p, True)[0]
    return dropped


def _rms_norm(
    hidden: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Run RMSNorm as CUDA does (layer_norm.cpp, rms_norm_symint).

    Since 2.9 it is one kernel if the weight has the input's dtype.
    """
    call = (hidden, normalized_shape, weight, eps)
    if weight is not None and weight.dtype != hidden.dtype:
        return aten.rms_norm.default.decompose(*call)  # type: ignore[no-any-return]
    out: Tensor = _FusedRmsNorm.apply(*call)  # type: ignore[no-untyped-call]
    return out


class _FusedRmsNorm(torch.autograd.Function):
    """The fused RMSNorm of CUDA (cuda/layer_norm_kernel.cu).

    It stores its input and one float32 number for each row. On a CPU autograd decomposes the
    operator before it is run.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        eps: float | None,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out, scale = aten._fused_rms_norm.default(hidden, normalized_shape, weight, eps)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.normalized_shape = normalized_shape
        return cast(Tensor, out)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        with torch._C._AutoDispatchBelowAutograd():
            grad_hidden, grad_weight = aten._fused_rms_norm_backward.default(
                grad_outputs[0].contiguous(), hidden, ctx.normalized_shape, scale, weight, wanted
            )
        return grad_hidden, None, grad_weight, None


@contextmanager
def cuda_behaviour(target: CudaTarget) -> Iterator[None]:
    """Make fake CPU tensors behave as CUDA tensors in this process until the block ends."""
    library = torch.library.Library("aten", "IMPL")
    # versions before 2.8 override without being asked
    can_be_told = "allow_override" in signature(library.impl).parameters
    overrides = {"allow_override": True} if can_be_told else {}
    with ExitStack() as stack:
        stack.callback(library._destroy)
        # optim/optimizer.py: optimizers take their foreach path by default on CUDA only.
        foreach_devices = "_get_foreach_kernels_supported_devices"
        stack.enter_context(patch.object(_optimizer, foreach_devices, lambda: ["cpu", "cuda"]))
        stack.enter_context(card_is_recorded(target.compute_capability))
        # PyTorch warns that registered kernels are overridden, which is intended.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, kernel in _autocast_rules():
                library.impl(name, kernel, "AutocastCPU", **overrides)
            for name, kernel in (
                ("scaled_dot_product_attention", scaled_dot_product_attention(target)),
                ("dropout", _dropout),
                ("rms_norm", _rms_norm),
            ):
                library.impl(name, kernel, "AutogradCPU", **overrides)
        yield
