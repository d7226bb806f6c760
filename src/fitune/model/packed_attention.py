"""Attention over packed rows: each row attends to itself only, and no mask of T x T is built.

Rows lie one after another in one sequence of T positions. Their boundaries are host numbers (`RowBoundaries`), given to
the model's forward as the keyword `row_boundaries`, which transformers hands on to each attention layer unchanged. A
keyword, not a context variable: recomputation runs layers again inside the backward, on another thread and after the
forward has left every context, and the keyword is part of what it replays.

On a CPU the rows are a loop of causal attention calls, long rows a few queries at a time; on CUDA one variable-length
kernel (torch's, or flash-attn). Sliding windows, soft-capped scores and attention sinks are computed as the model asks;
`can_pack` tells which models cannot be packed, by looking whether each of their layers really received the boundaries.

    B rows of a padded batch    S positions of a row    T positions of all packed rows
    H query heads               G heads of keys and values     D size of a head
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.amp.autocast_mode import is_autocast_available
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fitune.config import Attention, Auto
from fitune.errors import ModelError

Kernel = Literal["rows", "varlen", "flash_attn"]

LEAST_CUT = 192
CUT_QUERIES = 128
_NAME = "fitune_rows"
# transformers looks for an outside package when a name contains "flash", so that kernel is registered as "tiled"
_FORCED: dict[str, tuple[str, SDPBackend]] = {
    "flash": (f"{_NAME}_tiled", SDPBackend.FLASH_ATTENTION),
    "efficient": (f"{_NAME}_efficient", SDPBackend.EFFICIENT_ATTENTION),
    "math": (f"{_NAME}_math", SDPBackend.MATH),
}


@dataclass(frozen=True)
class RowBoundaries:
    """Where the rows of one packed sequence begin and end.

    lengths: of the rows in order, host numbers, their sum is T. cumulative: int32 [rows + 1] on the model's device.
    kernel: forces one way to compute; None takes the best that the device and the data type have.
    """

    lengths: tuple[int, ...]
    cumulative: torch.Tensor
    longest: int
    kernel: Kernel | None = None
    visits: list[int] = field(
        default_factory=list, compare=False, repr=False
    )  # layers that asked, for can_pack
    edges: dict[torch.dtype, torch.Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )  # see _edge


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights.

    scaling: of the scores, 1/sqrt(D) where None. window: how many last positions a query sees, itself included.
    softcap: scores become softcap * tanh(score / softcap). sinks_H: a score per head that takes part in the softmax and
    is dropped.
    """

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None
    backend: SDPBackend | None

    @property
    def needs_steps(self) -> bool:
        """Whether no fused kernel of torch computes it."""
        return self.softcap is not None or self.sinks_H is not None


def row_boundaries(
    lengths: tuple[int, ...], *, device: torch.device, kernel: Kernel | None = None
) -> RowBoundaries:
    """The boundaries of packed rows, for `model(input_ids, position_ids=..., row_boundaries=...)`."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        ends = ends.pin_memory()
    return RowBoundaries(
        lengths, ends.to(device, non_blocking=True), max(lengths, default=0), kernel
    )


def attention_name(config: PretrainedConfig, attention: Attention | Auto) -> str | None:
    """The entry of transformers' attention registry that `model.attention` means for this architecture: ours where the
    model goes through the registry, else transformers' own. None leaves a model with its own code as it is.

    Raises ModelError where the architecture cannot have the attention that was asked for.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if attention == "eager":
        return "eager"
    if model_class is not None and getattr(model_class, "_supports_attention_backend", False):
        return _NAME if attention == "auto" else _FORCED[attention][0]
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
    """Raises ModelError where torch has no such kernel for `device` and for matrix products in `dtype`."""
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
    """Why this model's rows cannot be packed, as one clause, or None if they can.

    Runs two tokens through the model (also on the meta device) and counts the layers that the boundaries reached.
    """
    config = cast(PretrainedConfig, model.config).get_text_config()
    implementation = config._attn_implementation or ""
    if not implementation.startswith(_NAME):
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, with its names for parameters (s_aux: attention sinks). Returns [B, S, H, D].

    Without boundaries each of the B rows is one causal row; padding stands right of all that is real, so the causal
    order hides it and no mask is needed.
    """
    if position_bias is not None:
        raise ModelError(
            "this model adds a bias to its attention scores, which fitune cannot compute by samples"
        )
    scoring = Scoring(scaling, dropout, sliding_window, softcap, s_aux, backend)
    if row_boundaries is None:
        attended = _attend(query_BHSD, key_BGSD, value_BGSD, scoring=scoring, mask=attention_mask)
        return attended.transpose(1, 2).contiguous(), None
    row_boundaries.visits.append(1)
    kind = query_BHSD.device.type
    if is_autocast_available(kind) and torch.is_autocast_enabled(
        kind
    ):  # rotary embeddings leave float32
        dtype = torch.get_autocast_dtype(kind)  # torch's own attention casts by itself
        query_BHSD, key_BGSD, value_BGSD = (
            part.to(dtype) for part in (query_BHSD, key_BGSD, value_BGSD)
        )
    kernel = row_boundaries.kernel or _choose_kernel(query_BHSD, value_BGSD, scoring)
    if kernel != "rows":
        query_THD, key_TGD, value_TGD = (
            part.squeeze(0).transpose(0, 1)  # the backward of an index would fill zeros first
            for part in (query_BHSD, key_BGSD, value_BGSD)
        )
        attend_flat = _varlen if kernel == "varlen" else _flash_attn
        out_THD = attend_flat(
            query_THD, key_TGD, value_TGD, scoring=scoring, boundaries=row_boundaries
        )
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
    """A row's attention as pieces along S.

    The CPU's fused kernel multiplies a query with keys up to 512 behind it, so a long row is cut into a few queries at
    a time, each with the keys that they see: 20 to 27 % less time at 384 to 512 tokens, 7 to 13 % from 768 on, nothing
    below 192. On a card the row stays whole.
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
        yield _attend(query_BHSD, key_BGSD, value_BGSD, scoring=scoring)
        return
    edge = _edge(boundaries, query_BHSD)
    num_pieces = -(-length // CUT_QUERIES)
    ends = [length * number // num_pieces for number in range(num_pieces + 1)]
    for start, end in pairwise(ends):
        mask = edge[CUT_QUERIES - (end - start) :, edge.shape[1] - end :] if start else None
        parts = query_BHSD[:, :, start:end], key_BGSD[:, :, :end], value_BGSD[:, :, :end]
        yield _attend(*parts, scoring=scoring, mask=mask)


def _edge(boundaries: RowBoundaries, query: torch.Tensor) -> torch.Tensor:
    """[CUT_QUERIES, longest row]: what the last queries of a row may see of it, 0 or -inf. A lower right corner is the
    mask of some queries and all keys up to the last of them. Made once for all layers."""
    if query.dtype not in boundaries.edges:
        longest = max(CUT_QUERIES, boundaries.longest)
        hidden = torch.full(
            (CUT_QUERIES, longest), -torch.inf, dtype=query.dtype, device=query.device
        )
        boundaries.edges[query.dtype] = hidden.triu(longest - CUT_QUERIES + 1)
    return boundaries.edges[query.dtype]


def _attend(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    scoring: Scoring,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of whole rows, [B, H, S, D]. Keys may begin before the queries (generation with a cache)."""
    num_queries, num_keys = query_BHSD.shape[2], key_BGSD.shape[2]
    window = scoring.window if scoring.window is not None and scoring.window < num_keys else None
    fused_causal = num_queries == num_keys and window is None and not scoring.needs_steps
    if mask is None and not fused_causal and (num_queries > 1 or window is not None):
        mask = _band(num_queries, num_keys, window, query_BHSD.device)
    if scoring.needs_steps:
        return _attend_in_steps(query_BHSD, key_BGSD, value_BGSD, scoring=scoring, mask=mask)
    with sdpa_kernel(scoring.backend) if scoring.backend is not None else nullcontext():
        return functional.scaled_dot_product_attention(
            query_BHSD,
            key_BGSD,
            value_BGSD,
            attn_mask=mask,
            dropout_p=scoring.dropout,
            is_causal=mask is None and num_queries > 1,
            scale=scoring.scaling,
            enable_gqa=query_BHSD.shape[1] != key_BGSD.shape[1],
        )


def _attend_in_steps(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    *,
    scoring: Scoring,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """The same with materialised scores. The softmax is in float32, as in transformers' eager attention."""
    repeats = query_BHSD.shape[1] // key_BGSD.shape[1]
    key_BHSD, value_BHSD = (
        part.repeat_interleave(repeats, dim=1) for part in (key_BGSD, value_BGSD)
    )
    scale = scoring.scaling if scoring.scaling is not None else query_BHSD.shape[-1] ** -0.5
    scores = query_BHSD @ key_BHSD.transpose(2, 3) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if scoring.sinks_H is not None:
        sinks = (
            scoring.sinks_H.to(scores.dtype)
            .view(1, -1, 1, 1)
            .expand(scores.shape[0], -1, scores.shape[2], 1)
        )
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value_BHSD.dtype)[
        ..., : key_BHSD.shape[2]
    ]
    return functional.dropout(weights, scoring.dropout) @ value_BHSD


def _band(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """bool [num_queries, num_keys]: what a query may see, the last query being at the last key's position."""
    distance = (
        torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        - torch.arange(num_keys, device=device)[None, :]
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _choose_kernel(
    query: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    *,
    has_flash_attn: bool | None = None,
) -> Kernel:
    """The variable-length kernels need CUDA, 16 bits, heads of at most 256 and one size for query and value."""
    plain = not scoring.needs_steps and scoring.dropout == 0 and scoring.backend is None
    capability = compute_capability(query)
    if capability is None or not (
        plain and query.element_size() == 2 and query.shape[-1] == value.shape[-1] <= 256
    ):
        return "rows"
    if query.is_cuda and (_has_flash_attn() if has_flash_attn is None else has_flash_attn):
        return "flash_attn"
    return "varlen" if capability >= (8, 0) else "rows"


def compute_capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Of the card that the tensor is on, None off CUDA. A recording for a card puts that card here."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None


def _varlen(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    *,
    scoring: Scoring,
    boundaries: RowBoundaries,
) -> torch.Tensor:
    longest, cumulative = boundaries.longest, boundaries.cumulative
    accepted = _varlen_parameters()
    options: dict[str, Any] = {"scale": scoring.scaling}
    if "enable_gqa" in accepted:
        options["enable_gqa"] = query_THD.shape[1] != key_TGD.shape[1]
    else:
        repeats = query_THD.shape[1] // key_TGD.shape[1]
        key_TGD, value_TGD = (
            part.repeat_interleave(repeats, dim=1) for part in (key_TGD, value_TGD)
        )
    if "window_size" in accepted:
        options["window_size"] = (-1 if scoring.window is None else scoring.window - 1, 0)
    else:
        if scoring.window is not None and scoring.window < longest:
            raise ModelError(
                "this torch has no sliding window for packed samples on CUDA: update torch or add flash-attn"
            )
        options["is_causal"] = True
    lengths = (cumulative, cumulative, longest, longest)
    return cast(torch.Tensor, _varlen_attn()(query_THD, key_TGD, value_TGD, *lengths, **options))


def _flash_attn(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    *,
    scoring: Scoring,
    boundaries: RowBoundaries,
) -> torch.Tensor:
    longest, cumulative = boundaries.longest, boundaries.cumulative
    lengths = (cumulative, cumulative, longest, longest)
    window = (-1 if scoring.window is None else scoring.window - 1, 0)
    attend = importlib.import_module("flash_attn").flash_attn_varlen_func
    return cast(
        torch.Tensor,
        attend(
            query_THD,
            key_TGD,
            value_TGD,
            *lengths,
            softmax_scale=scoring.scaling,
            causal=True,
            window_size=window,
        ),
    )


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Its arguments changed between torch versions: is_causal in 2.10, window_size and enable_gqa later."""
    return frozenset(inspect.signature(_varlen_attn()).parameters)


def _register(attend: Callable[..., Any]) -> None:
    """No mask function goes with these names, so transformers builds no mask: our attention is causal by itself."""
    AttentionInterface.register(_NAME, attend)
    for name, backend in _FORCED.values():
        AttentionInterface.register(name, functools.partial(attend, backend=backend))


def prepare_for_compilation() -> None:
    """From now on a compiled layer has torch's variable-length kernel in its compiled code, to which row lengths are
    data, and leaves that code for any other attention, which would be compiled anew for every set of row lengths."""
    outside = torch.compiler.disable(rows_attention)
    has_kernel = (
        torch.cuda.is_available()
        and not _has_flash_attn()
        and "window_size" in _varlen_parameters()
    )
    _register(
        functools.partial(_attention_in_compiled_layer, outside, _varlen_attn())
        if has_kernel
        else outside
    )


def _attention_in_compiled_layer(
    outside: Callable[..., Any],
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
    **options: Any,
) -> tuple[torch.Tensor, None]:
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
            tuple[torch.Tensor, None], outside(module, *parts, attention_mask, **given, **options)
        )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        parts = query_BHSD.to(dtype), key_BGSD.to(dtype), value_BGSD.to(dtype)
    if _choose_kernel(parts[0], parts[2], scoring, has_flash_attn=False) != "varlen":
        return cast(
            tuple[torch.Tensor, None], outside(module, *parts, attention_mask, **given, **options)
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
