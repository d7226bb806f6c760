"""What a CUDA device does otherwise than the CPU tensors that a recording runs on: each rule once, with its source.

`cuda_behaviour(target)` makes the process behave as CUDA for the length of a recording: autocast's lists, the fused
attention kernels, dropout, the optimizers' foreach default. `CudaKernels` adds what the kernels allocate without
showing it to a dispatch mode. Sources are files of PyTorch 2.13 unless another version is named.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from math import ceil
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fitune.errors import UsageError
from fitune.model import attention as rows_attention
from fitune.trace.allocation import Allocation, Free
from fitune.trace.events import Phase
from fitune.trace.operators import by_operator

aten = torch.ops.aten
_optimizer = import_module("torch.optim.optimizer")  # torch.optim does not show it
Attention = Literal["auto", "flash", "efficient", "math", "eager"]
Rule = Callable[["CudaTarget", tuple[Any, ...], Sequence[Tensor]], Sequence[Allocation]]
Kernel = Literal["flash", "efficient", "cudnn", "math"]
_16_BIT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class CudaTarget:
    """The card that is recorded for. attention: "auto" follows PyTorch's own choice; "flash", "efficient" and "math"
    force one for `scaled_dot_product_attention`; "eager" says that the model itself materialises scores, so it
    changes nothing here. name, total_bytes: what a loop is told that asks."""

    compute_capability: tuple[int, int] = (8, 0)
    attention: Attention = "auto"
    name: str = field(default="CUDA", compare=False)
    total_bytes: int = field(default=0, compare=False)


# ---- autocast -------------------------------------------------------------------------------------------------------
# ATen/autocast_mode.h: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE. CPU's own lists are shorter.

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
# In CPU's float32 list and in none of CUDA's (autocast_mode.cpp): CUDA decomposes or runs them as they come.
_NOT_IN_CUDA = ("cross_entropy_loss",)


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
    for name in _NOT_IN_CUDA:
        yield name, _decomposing(_overload(name))


def _casting(op: Any, dtype_of: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = list(_float_tensors((args, tuple(kwargs.values()))))
        dtype = dtype_of(tensors) if tensors else torch.float32
        with _without_autocast():
            return op(*_cast(args, dtype), **{key: _cast(value, dtype) for key, value in kwargs.items()})

    return kernel


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return torch.float32 if any(tensor.dtype == torch.float32 for tensor in tensors) else tensors[0].dtype


def _with_float32_output(op: Any) -> Callable[..., Any]:
    """fp32_set_opt_dtype: the kernel reads 16 bit and writes float32 unless the call names another dtype."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        names = [argument.name for argument in op._schema.arguments]
        positional = dict(zip(names, args, strict=False))
        if args[0].dtype in _16_BIT and kwargs.get("dtype", positional.get("dtype")) is None:
            kwargs["dtype"] = torch.float32
            args = tuple(value for name, value in positional.items() if name != "dtype")
        with _without_autocast():
            return op(*args, **kwargs)

    return kernel


def _decomposing(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return op.decompose(*args, **kwargs)  # its parts meet autocast again

    return kernel


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


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


# ---- attention ------------------------------------------------------------------------------------------------------


def choose_attention(target: CudaTarget, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Kernel:
    """PyTorch's choice of kernel (transformers/cuda/sdp_utils.cpp: select_sdp_backend): flash, efficient, cudnn, math.

    query: [B, H, S, d]. call: mask (Tensor or None), dropout, is_causal, needs_gradient.
    """
    if target.attention == "flash" and query.dtype not in _16_BIT:
        raise UsageError(f"flash attention needs 16 bits, but the queries are {query.dtype}: choose another attention")
    if target.attention == "flash" or target.attention == "efficient" or target.attention == "math":
        return target.attention
    enabled: dict[Kernel, bool] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    # check_prefer_cudnn_attention: Hopper and data-centre Blackwell try cuDNN first (cuDNN 9.15.1 and newer)
    first: tuple[Kernel, ...] = ("cudnn",) if target.compute_capability in ((9, 0), (10, 0), (10, 3)) else ()
    possible: dict[Kernel, bool] = {
        "flash": _flash_can(target, query, key, value, **call),
        "efficient": _efficient_can(target, query, key, value),
        "cudnn": _cudnn_can(target, query, key, value),
    }
    order: tuple[Kernel, ...] = (*first, "flash", "efficient")
    for kernel in order:
        if enabled[kernel] and possible[kernel]:
            return kernel
    return "math"


def _flash_can(
    target: CudaTarget,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    needs_gradient: bool,
) -> bool:
    head_dim = query.shape[-1]
    wide = target.compute_capability in ((8, 6), (8, 9), (12, 0), (12, 1)) and needs_gradient
    return (
        (8, 0) <= target.compute_capability <= (12, 1)
        and query.dtype in _16_BIT
        and mask is None
        and head_dim <= 256
        and head_dim == key.shape[-1] == value.shape[-1]
        and not (wide and (192 < head_dim <= 224 or (head_dim > 224 and dropout > 0)))
        and not (is_causal and query.shape[-2] != key.shape[-2])
        and _last_dim_contiguous(query, key, value)
    )


def _efficient_can(target: CudaTarget, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Its backward knows no grouped heads, so `check_batch_size_and_num_heads_dense<false>` sends those elsewhere."""
    alignment = 8 if query.dtype in _16_BIT else 4  # minimum_gemm_alignment: 128 bits, for 16 bit on tensor cores
    return (
        target.compute_capability >= (5, 0)
        and (
            query.dtype in (torch.float16, torch.float32)
            or (query.dtype == torch.bfloat16 and target.compute_capability >= (8, 0))
        )
        and query.shape[1] == key.shape[1] == value.shape[1]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
        and _last_dim_contiguous(query, key, value)
    )


def _cudnn_can(target: CudaTarget, query: Tensor, key: Tensor, value: Tensor) -> bool:
    limit = 256 if target.compute_capability >= (9, 0) else 128
    return (
        query.dtype in _16_BIT
        and query.shape[-1] % 8 == 0
        and max(query.shape[-1], value.shape[-1]) <= limit
        and query.shape[-2] > 1
        and _last_dim_contiguous(query, key, value)
    )


def _last_dim_contiguous(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 for tensor in tensors)


def _scaled_dot_product_attention(target: CudaTarget) -> Callable[..., Tensor]:
    """transformers/attention.cpp: scaled_dot_product_attention, its CUDA branch."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(query, FakeTensor) or query.dim() != 4:
            return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        chosen = choose_attention(
            target, query, key, value,
            mask=attn_mask, dropout=dropout_p, is_causal=is_causal, needs_gradient=needs_gradient,
        )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool and chosen != "math":
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)  # convert_boolean_attn_mask
        if chosen == "flash":
            return flash_attention(query, key, value, dropout=dropout_p, is_causal=is_causal, scale=scale)
        if chosen == "efficient":
            if repeats := query.shape[1] // key.shape[1] - 1:  # forced: the caller has to repeat the heads
                key, value = (part.repeat_interleave(repeats + 1, dim=1) for part in (key, value))
            bias = None if attn_mask is None else _aligned_bias(attn_mask, query, key)
            return _first(
                aten._scaled_dot_product_efficient_attention(
                    query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
                )
            )
        if chosen == "cudnn":
            return _first(
                aten._scaled_dot_product_cudnn_attention(
                    query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, False, scale=scale
                )
            )
        return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    return kernel


def _math_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    mask, dropout, is_causal, scale, enable_gqa = rest
    return _first(
        aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    )


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, is_causal: bool, scale: float | None
) -> Tensor:
    """[B, H, S, d]. pad_last_dim<8>: a head size that is no multiple of 8 is padded before and cut after the kernel."""
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if padding := -head_dim % 8:
        query, key, value = (torch.nn.functional.pad(t, (0, padding)) for t in (query, key, value))
    out = _first(aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale))
    return out[..., :head_dim] if padding else out


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """preprocess_mask: rows padded to a multiple of 16 elements, then a view of [B, H, Sq, Sk]."""
    length = mask.shape[-1]
    if padding := -length % 16:
        mask = torch.nn.functional.pad(mask, (0, padding))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


# ---- hidden allocations ---------------------------------------------------------------------------------------------

_GEMMS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._addmm_activation, aten.mv, aten.addmv, aten.dot}


class CudaKernels:
    """What CUDA's kernels allocate inside. `inner` carries the operators out."""

    def __init__(self, target: CudaTarget, inner: Callable[..., Any]) -> None:
        self.target = target
        self.call = inner
        self._threads_with_workspace: frozenset[bool] = frozenset()  # a copy goes on by itself

    def workspaces(self, func: Any, phase: Phase) -> Sequence[int]:
        """cuda/CUDABlas.cpp, CublasHandlePool.cpp: one workspace per handle and stream through the caching allocator,
        at the first matrix product; the autograd thread has a handle of its own."""
        autograd_thread = phase == "backward"
        if autograd_thread in self._threads_with_workspace or func.overloadpacket not in _GEMMS:
            return ()
        self._threads_with_workspace |= {autograd_thread}
        return (cublas_workspace_bytes(self.target),)

    def allocations(self, func: Any, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation] | None:
        rule = _rule_of(func)
        return None if rule is None else rule(self.target, args, outputs)


class CpuKernels:
    """The recording machine's own kernels: nothing is added."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.call = inner

    def workspaces(self, func: Any, phase: Phase) -> Sequence[int]:
        return ()

    def allocations(self, func: Any, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation] | None:
        return None


def cublas_workspace_bytes(target: CudaTarget) -> int:
    """:4096:2:16:8, i.e. 2 of 4,096 KiB and 8 of 16 KiB; 32 MiB on Hopper and newer (getChosenWorkspaceSize)."""
    return 4096 * 1024 * 8 if target.compute_capability >= (9, 0) else 4096 * 1024 * 2 + 16 * 1024 * 8


def _flash_backward(target: CudaTarget, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation]:
    """transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: softmax_d, dq_accum, and dk, dv for every query head."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = _ceil_to(length, 128)
    expanded = batch * heads * key.shape[2] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    return (batch * heads * rows * 4, batch * heads * rows * _rounded_head(head_dim) * 4, *grouped)


def _varlen_backward(target: CudaTarget, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation]:
    """flash_api.cpp, mha_varlen_bwd: as above over the flat positions, each row padded to 128."""
    query, key, boundaries = args[1], args[2], args[6]
    tokens, heads, head_dim = query.shape
    rows = tokens + 128 * (boundaries.shape[0] - 1)
    expanded = heads * key.shape[0] * head_dim * query.element_size()
    grouped = (expanded, expanded) if key.shape[1] != heads else ()
    return (heads * rows * 4, rows * heads * _rounded_head(head_dim) * 4, *grouped)


def _rounded_head(head_dim: int) -> int:
    return _ceil_to(head_dim, 32) if head_dim <= 192 else 256


def _efficient_backward(target: CudaTarget, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation]:
    """transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h (Params::workspace_size): delta,
    computed by the kernel in 16 bits, by a float32 product and its sum else; then a float32 accumulator for dq, and
    for dk and dv where they do not stay in registers."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    half = query.element_size() == 2
    rows, columns, in_registers = _efficient_block(half, head_dim, target.compute_capability)
    splits = ceil(key.shape[2] / columns)
    if in_registers and batch * heads >= 256 and key.shape[2] <= 2 * columns:
        splits = 1
    elif not in_registers:
        splits = max(1, min(splits, 200 // (batch * heads)))
    dq = ceil(length / rows) * ceil(head_dim / columns) * (rows * columns + 4)
    dk_dv = 0 if in_registers else 2 * splits * columns * _ceil_to(head_dim, rows)
    workspace = batch * heads * _ceil_to(dq + dk_dv, 4) * 4
    delta = batch * heads * length * 4
    return (delta, workspace) if half else (delta * head_dim, delta, Free(0), Free(1), delta, workspace)


_LARGE_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))  # 160 KiB a block and more; the others about 100


def _efficient_block(half: bool, head_dim: int, capability: tuple[int, int]) -> tuple[int, int, bool]:
    """(rows, columns, whether dk and dv stay in registers) of the first kernel in kernels/cutlassB.h that takes
    head_dim and fits the card's shared memory."""
    if head_dim <= 64:
        return 64, 64, half
    if half and head_dim <= 96 and capability in ((8, 6), (8, 9)):
        return 128, 64, True
    if half and head_dim <= 128:
        return (128, 128, True) if capability in _LARGE_SHARED_MEMORY else (64, 64, False)
    return (128, 64, False) if half or capability >= (8, 0) else (64, 64, False)


def _embedding_backward(target: CudaTarget, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation]:
    """cuda/Embedding.cu and EmbeddingBackwardKernel.cu: many tokens are sorted and summed per segment in float32."""
    grad, indices, num_weights = args[0], args[1], args[2]
    tokens = indices.numel()
    if tokens <= (4096 if target.compute_capability >= (9, 0) else 3072):
        return ()
    segments = min(tokens, num_weights)
    partial = tokens // 10 + segments  # NROWS_PER_THREAD
    size = indices.element_size()
    indices_and_segments = (tokens, tokens, tokens, 1, segments, segments, 1, partial)
    return (*(number * size for number in indices_and_segments), partial * grad.shape[-1] * max(4, grad.element_size()))


def _foreach_norm(target: CudaTarget, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Sequence[Allocation]:
    """cuda/ForeachReduceOp.cu: one partial norm per chunk of 65,536 elements of the largest tensor, for each tensor."""
    tensors = args[0]
    chunks = max(ceil(tensor.numel() / 65536) for tensor in tensors)
    return (len(tensors) * chunks * max(4, tensors[0].element_size()),)


def _ceil_to(number: int, step: int) -> int:
    return ceil(number / step) * step


_RULES: dict[str, Rule] = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_flash_attention_backward": _varlen_backward,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::_foreach_norm": _foreach_norm,
}


@by_operator
def _rule_of(func: Any) -> Rule | None:
    return _RULES.get(func._schema.name)


def temporaries_by_shape(target: CudaTarget, op: str, arguments: Sequence[Any]) -> list[int]:
    """Bytes of what operator `op` allocates inside, one after the other. arguments: tensors as (shape, dtype)."""
    tensors = [
        torch.empty(value[0], dtype=value[1], device="meta") if isinstance(value, tuple) and _is_shape(value) else value
        for value in arguments
    ]
    return [step for step in _RULES[op](target, tuple(tensors), ()) if isinstance(step, int)]


def _is_shape(value: tuple[Any, ...]) -> bool:
    return len(value) == 2 and isinstance(value[1], torch.dtype)


# ---- for the length of a recording ----------------------------------------------------------------------------------


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Dropout.cpp: CUDA's fused kernel keeps a mask of one byte per element."""
    if p == 0 or not train or not tensor.numel():
        return tensor
    return _first(aten.native_dropout(tensor, p, True))


@contextmanager
def cuda_behaviour(target: CudaTarget) -> Iterator[None]:
    """Fake CPU tensors behave as CUDA tensors inside, in this process; everything is undone afterwards."""
    library = torch.library.Library("aten", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        # optim/optimizer.py: optimizers take their foreach path by default on CUDA only
        stack.enter_context(patch.object(_optimizer, "_get_foreach_kernels_supported_devices", lambda: ["cpu", "cuda"]))
        capability = target.compute_capability
        stack.enter_context(patch.object(rows_attention, "compute_capability", lambda _: capability))
        with warnings.catch_warnings(action="ignore"):  # that a registered kernel is overridden is meant
            for name, kernel in _autocast_rules():
                library.impl(name, kernel, "AutocastCPU", allow_override=True)
            for name, kernel in (
                ("scaled_dot_product_attention", _scaled_dot_product_attention(target)),
                ("dropout", _dropout),
            ):
                library.impl(name, kernel, "AutogradCPU", allow_override=True)
        yield
