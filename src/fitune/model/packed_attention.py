"""Compute attention over packed samples: each attends only to itself, without a T x T mask.

The samples of a packed sequence of T tokens follow one another. Their boundaries are Python numbers
(`RowBoundaries`), given to the model's forward as the keyword `row_boundaries`, which transformers
passes to each attention layer unchanged. A context variable would not work: gradient checkpointing
runs layers again in the backward pass, on another thread and after the forward has left every
context, whereas it repeats the keyword arguments.

On a CPU a loop calls causal attention for each sample, with a few queries at a time for a long one.
On CUDA one variable-length kernel (torch's or flash-attn's) computes all samples. Sliding windows,
soft-capped scores and attention sinks are computed as the model defines them. `can_pack` finds out
which models cannot be packed: it checks that each of their layers really received the boundaries.

    B samples of a padded batch    S tokens of a sample    T tokens of all packed samples
    H query heads                  G heads of keys and values     D size of a head
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import nn
from torch.amp.autocast_mode import is_autocast_available
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fitune.config import Attention, Auto
from fitune.errors import ModelError
from fitune.model.rotary import Angles, angles_of
from fitune.model.row_attention import Scoring, attend
from fitune.model.varlen import PackedSamples, attend_packed, has_window, varlen_attn
from fitune.recorder.recorded_card import recorded_capability

Kernel = Literal["rows", "varlen", "flash_attn"]

#: tokens of a sample from which on a CPU computes its queries in pieces
LEAST_CUT = 192
#: queries of such a piece
CUT_QUERIES = 128
#: the entry of transformers' attention registry that takes the best kernel
NAME = "fitune_rows"
# transformers looks for a package if a name contains "flash", so that kernel is named "tiled".
_FORCED: dict[str, tuple[str, SDPBackend]] = {
    "flash": (f"{NAME}_tiled", SDPBackend.FLASH_ATTENTION),
    "efficient": (f"{NAME}_efficient", SDPBackend.EFFICIENT_ATTENTION),
    "math": (f"{NAME}_math", SDPBackend.MATH),
}


@dataclass(frozen=True)
class RowBoundaries:
    """Where the samples of one packed sequence begin and end."""

    #: the tokens of each sample in order; their sum is T
    lengths: tuple[int, ...]
    #: int32 [samples + 1] on the model's device
    cumulative: torch.Tensor
    #: tokens of the longest sample
    longest: int
    #: forces one kernel; None takes the best one for the device and the dtype
    kernel: Kernel | None = None
    #: one element for each layer that received the boundaries, for `can_pack`
    visits: list[int] = field(default_factory=list, compare=False, repr=False)
    #: the masks that `_edge` has made, by dtype
    edges: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    #: the last result of `angles`, with the cosines that it was made of
    known_angles: list[tuple[torch.Tensor, Angles]] = field(
        default_factory=list, compare=False, repr=False
    )

    def angles(self, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
        """Return the angles of these rotary embeddings, made once for all layers."""
        if not self.known_angles or self.known_angles[0][0] is not cos:
            self.known_angles[:] = [(cos, angles_of(cos, sin))]
        return self.known_angles[0][1]


def row_boundaries(
    lengths: tuple[int, ...], *, device: torch.device, kernel: Kernel | None = None
) -> RowBoundaries:
    """Return boundaries for `model(input_ids, position_ids=..., row_boundaries=...)`."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        ends = ends.pin_memory()
    return RowBoundaries(
        lengths, ends.to(device, non_blocking=True), max(lengths, default=0), kernel
    )


def attention_name(config: PretrainedConfig, attention: Attention | Auto) -> str | None:
    """Return the entry of transformers' attention registry for `model.attention`.

    It is an entry of fitune if the architecture uses the registry, else one of transformers. None
    leaves a model with its own attention code unchanged.

    Raises ModelError if the architecture does not support the configured attention.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if attention == "eager":
        return "eager"
    if model_class is not None and getattr(model_class, "_supports_attention_backend", False):
        return NAME if attention == "auto" else _FORCED[attention][0]
    if attention == "auto":
        return (
            None
            if model_class is None or getattr(model_class, "_supports_sdpa", False)
            else "eager"
        )
    raise ModelError(
        f"model.attention={attention} is not available for '{config.model_type}': use auto or eager"
    )


def check_attention(
    attention: Attention | Auto, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ModelError if torch has no such kernel for the device and dtype.

    dtype: that of matrix products.
    """
    if attention == "efficient" and device.type == "cpu":
        raise ModelError(
            "model.attention=efficient exists on CUDA only: use auto, flash, math or eager on a CPU"
        )
    if attention == "flash" and device.type == "cuda" and dtype == torch.float32:
        raise ModelError(
            "model.attention=flash needs 16 bits on CUDA, but model.precision is float32: "
            "use model.precision=autocast_bfloat16, or model.attention=efficient"
        )


def can_pack(model: nn.Module) -> str | None:
    """Return why the samples of this model cannot be packed, as one clause; None if they can.

    Two tokens are run through the model (on the meta device too) to count the layers that receive
    the boundaries.
    """
    config = cast(PretrainedConfig, model.config).get_text_config()
    implementation = config._attn_implementation or ""
    if not implementation.startswith(NAME):
        return f"attention '{implementation}' does not take sample boundaries"
    layers: list[str] = getattr(config, "layer_types", None) or []
    strange = set(layers) - {"full_attention", "sliding_attention"}
    if strange:
        return f"layers of kind {', '.join(sorted(strange))} carry state from sample to sample"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "its attention works in chunks"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        return "its attention is not causal"
    mixing = next(
        (
            type(part).__name__
            for part in model.modules()
            if isinstance(part, nn.Conv1d | nn.RNNBase)
        ),
        None,
    )
    if mixing is not None:
        return f"its {mixing} mixes neighbouring samples"
    device = next(model.parameters()).device
    boundaries = row_boundaries((1, 1), device=device)
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens, position_ids=tokens, use_cache=False, row_boundaries=boundaries)
    except (TypeError, ValueError) as error:
        return f"its forward does not take sample boundaries ({str(error).splitlines()[0]})"
    finally:
        model.train(was_training)
    if len(boundaries.visits) != config.num_hidden_layers:
        return f"sample boundaries reach {len(boundaries.visits)} of its {config.num_hidden_layers} layers"
    return None


def rows_attention(
    module: nn.Module,
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    row_boundaries: RowBoundaries | None = None,
    backend: SDPBackend | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention through transformers' interface; return [B, S, H, D] and None.

    The names of the parameters are those of transformers (s_aux: attention sinks).

    Without boundaries each of the B samples is one causal sequence. Padding is to the right of all
    real tokens, so causal attention never sees it and no mask is needed.
    """
    if position_bias is not None:
        raise ModelError(
            "this model adds a bias to its attention scores, which fitune cannot compute by samples"
        )
    scoring = Scoring(scaling, dropout, sliding_window, softcap, s_aux, backend)
    if row_boundaries is None:
        attended = attend(query_BHSD, key_BGSD, value_BGSD, scoring=scoring, mask=attention_mask)
        return attended.transpose(1, 2).contiguous(), None
    row_boundaries.visits.append(1)
    kind = query_BHSD.device.type
    if is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # Rotary embeddings return float32. Only torch's own attention casts under autocast.
        dtype = torch.get_autocast_dtype(kind)
        query_BHSD, key_BGSD, value_BGSD = (
            part.to(dtype) for part in (query_BHSD, key_BGSD, value_BGSD)
        )
    sizes = query_BHSD.shape[-1], value_BGSD.shape[-1]
    kernel = row_boundaries.kernel or choose_kernel(query_BHSD, query_BHSD.dtype, sizes, scoring)
    if kernel != "rows":
        query_THD, key_TGD, value_TGD = (
            # Not part[0]: the backward of indexing would fill a tensor with zeros first.
            part.squeeze(0).transpose(0, 1)
            for part in (query_BHSD, key_BGSD, value_BGSD)
        )
        samples = PackedSamples(
            row_boundaries.cumulative, row_boundaries.longest, scoring.scaling, scoring.window
        )
        attend_flat = attend_packed if kernel == "varlen" else _flash_attn
        out_THD = attend_flat(query_THD, key_TGD, value_TGD, samples)
        return out_THD[None], None
    parts = (
        torch.split(part, list(row_boundaries.lengths), dim=2)
        for part in (query_BHSD, key_BGSD, value_BGSD)
    )
    pieces = [
        piece.transpose(1, 2)
        for row in zip(*parts, strict=True)
        for piece in _attend_in_pieces(*row, scoring=scoring, boundaries=row_boundaries)
    ]
    return torch.cat(pieces, dim=1), None


def _attend_in_pieces(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    scoring: Scoring,
    boundaries: RowBoundaries,
) -> Iterator[torch.Tensor]:
    """Yield the attention of one sample in pieces along S.

    The CPU's fused kernel multiplies each query with up to 512 keys after it, which the causal
    order hides. A long sample is therefore computed a few queries at a time, each with the keys
    that they see. That takes 20 to 27 % less time at 384 to 512 tokens, 7 to 13 % less from 768
    tokens on, and saves nothing below 192. On a GPU a sample is computed as a whole.
    """
    length = query_BHSD.shape[2]
    whole = scoring.needs_steps or scoring.dropout > 0 or scoring.backend is not None
    whole |= scoring.window is not None and scoring.window < length
    if (
        whole
        or length < LEAST_CUT
        or query_BHSD.device.type != "cpu"
        or compute_capability(query_BHSD) is not None
    ):
        yield attend(query_BHSD, key_BGSD, value_BGSD, scoring=scoring)
        return
    edge = _edge(boundaries, query_BHSD)
    num_pieces = -(-length // CUT_QUERIES)
    ends = [length * number // num_pieces for number in range(num_pieces + 1)]
    for start, end in pairwise(ends):
        mask = edge[CUT_QUERIES - (end - start) :, edge.shape[1] - end :] if start else None
        parts = query_BHSD[:, :, start:end], key_BGSD[:, :, :end], value_BGSD[:, :, :end]
        yield attend(*parts, scoring=scoring, mask=mask)


def _edge(boundaries: RowBoundaries, query: torch.Tensor) -> torch.Tensor:
    """Return what the last queries of a sample may see, [CUT_QUERIES, longest], as 0 or -inf.

    A lower right corner of it is the mask of some queries and all keys up to the last of these
    queries. It is made once for all layers.
    """
    if query.dtype not in boundaries.edges:
        longest = max(CUT_QUERIES, boundaries.longest)
        hidden = torch.full(
            (CUT_QUERIES, longest), -torch.inf, dtype=query.dtype, device=query.device
        )
        boundaries.edges[query.dtype] = hidden.triu(longest - CUT_QUERIES + 1)
    return boundaries.edges[query.dtype]


def choose_kernel(
    where: torch.Tensor,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    scoring: Scoring,
    *,
    has_flash_attn: bool | None = None,
) -> Kernel:
    """Return the kernel for queries, keys and values of this dtype.

    The variable-length kernels need CUDA, 16 bits, heads of at most 256 numbers, and the same size
    of query and value.

    where: a tensor on the device.
    sizes: of the heads of queries and of values.
    """
    plain = not scoring.needs_steps and scoring.dropout == 0 and scoring.backend is None
    capability = compute_capability(where)
    if capability is None or not (
        plain and dtype.itemsize == 2 and sizes[0] == sizes[1] and sizes[0] <= 256
    ):
        return "rows"
    if where.is_cuda and (_has_flash_attn() if has_flash_attn is None else has_flash_attn):
        return "flash_attn"
    return "varlen" if capability >= (8, 0) else "rows"


def compute_capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the compute capability of the tensor's GPU, None off CUDA.

    In a recording for a GPU that is not there, it is that of this GPU.
    """
    if not tensor.is_cuda:
        return recorded_capability()
    number = tensor.get_device()
    if number not in _CAPABILITIES:
        _CAPABILITIES[number] = torch.cuda.get_device_capability(number)
    return _CAPABILITIES[number]


#: by the number of the GPU: each layer asks several times, and torch answers by way of its Python
_CAPABILITIES: dict[int, tuple[int, int]] = {}


def _flash_attn(
    query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, samples: PackedSamples
) -> torch.Tensor:
    lengths = (samples.cumulative, samples.cumulative, samples.longest, samples.longest)
    flash = importlib.import_module("flash_attn").flash_attn_varlen_func
    return cast(
        torch.Tensor,
        flash(
            query_THD,
            key_TGD,
            value_TGD,
            *lengths,
            softmax_scale=samples.scale,
            causal=True,
            window_size=samples.window_size,
        ),
    )


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _register(attend: Callable[..., object]) -> None:
    """Register an attention function under each of fitune's names.

    No mask function is registered for these names, so transformers builds no mask: this attention
    is causal by itself.
    """
    AttentionInterface.register(NAME, attend)
    for name, backend in _FORCED.values():
        AttentionInterface.register(name, functools.partial(attend, backend=backend))


def prepare_for_compilation() -> None:
    """Make compiled layers include torch's variable-length kernel.

    That kernel takes the lengths of samples as data. For any other attention a compiled layer
    returns to uncompiled code, since it would otherwise be compiled again for every set of lengths.
    """
    uncompiled = torch.compiler.disable(rows_attention)
    has_kernel = torch.cuda.is_available() and not _has_flash_attn() and has_window()
    _register(
        functools.partial(_attention_in_compiled_layer, uncompiled, varlen_attn())
        if has_kernel
        else uncompiled
    )


def _attention_in_compiled_layer(
    uncompiled: Callable[..., object],
    varlen: Callable[..., torch.Tensor],
    module: nn.Module,
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_boundaries: RowBoundaries | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Compute `rows_attention` inside a compiled layer, or call it uncompiled.

    uncompiled: `rows_attention`, excluded from compilation.
    varlen: torch's variable-length kernel.
    """
    given = {
        "scaling": scaling,
        "dropout": dropout,
        "sliding_window": sliding_window,
        "row_boundaries": row_boundaries,
    }
    parts = query_BHSD, key_BGSD, value_BGSD
    is_plain = all(
        options.get(name) is None for name in ("softcap", "s_aux", "position_bias", "backend")
    )
    scoring = Scoring(scaling, dropout, sliding_window, None, None, None)
    if row_boundaries is None or row_boundaries.kernel is not None or not is_plain:
        return cast(
            tuple[torch.Tensor, None],
            uncompiled(module, *parts, attention_mask, **given, **options),
        )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        parts = query_BHSD.to(dtype), key_BGSD.to(dtype), value_BGSD.to(dtype)
    sizes = parts[0].shape[-1], parts[2].shape[-1]
    kernel = choose_kernel(parts[0], parts[0].dtype, sizes, scoring, has_flash_attn=False)
    if kernel != "varlen":
        return cast(
            tuple[torch.Tensor, None],
            uncompiled(module, *parts, attention_mask, **given, **options),
        )
    query_THD, key_TGD, value_TGD = (part.squeeze(0).transpose(0, 1) for part in parts)
    lengths = (
        row_boundaries.cumulative,
        row_boundaries.cumulative,
        row_boundaries.longest,
        row_boundaries.longest,
    )
    out_THD = varlen(
        query_THD,
        key_TGD,
        value_TGD,
        *lengths,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query_THD.shape[1] != key_TGD.shape[1],
    )
    return out_THD[None], None


_register(rows_attention)
