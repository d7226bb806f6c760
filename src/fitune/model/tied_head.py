"""Add both gradients of a weight that is head and embedding into one tensor.

Autograd would allocate the embedding's gradient as a matrix of its own, of the size of the
vocabulary and nearly all zeros. For a small model with a large vocabulary that is the memory peak
of a step with gradient checkpointing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fitune.model import packed_attention as attention
from fitune.model.head import Head
from fitune.model.trained_whole import trained_layer


@contextmanager
def joined_to_embedding(head: Head) -> Iterator[list[Head]]:
    """Yield a list of heads, whose last one is the head for the loss after the decoder has run.

    Inside the block the decoder runs once. If the head's weight is also the embedding's, a head is
    appended to the list: its weight has a gradient to which that of the embedding is added.
    """
    heads = [head.with_trained_rows()]
    embedding = _tied_embedding(head)
    if embedding is None:
        yield heads
        return

    def join(_: nn.Module, args: tuple[object, ...], embedded: Tensor) -> Tensor | None:
        if len(heads) > 1 or not args:
            return None
        embedded, weight_VD = _Joined.apply(
            embedded.detach(), args[0], head.weight, embedding.padding_idx
        )  # type: ignore[no-untyped-call]
        heads.append(replace(head, joined_weight=weight_VD))
        return embedded

    handle = embedding.register_forward_hook(join)
    try:
        yield heads
    finally:
        handle.remove()


def _tied_embedding(head: Head) -> nn.Embedding | None:
    """Return the embedding that shares the head's weight, if it only selects rows of it.

    Returns None otherwise: Gemma's embedding, for example, scales them.
    """
    if not (torch.is_grad_enabled() and head.output.weight.requires_grad):
        return None
    embedding = trained_layer(head.decoder.get_input_embeddings())  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or embedding.weight is not head.weight:
        return None
    is_plain = (
        embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    )
    return embedding if is_plain else None


class _Joined(torch.autograd.Function):
    """Passes on (embedded tokens, weight), so that the backward gets both gradients at once."""

    @staticmethod
    def forward(
        ctx: Any, embedded_BSD: Tensor, ids_BS: Tensor, weight_VD: Tensor, padding_id: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids_BS)
        ctx.num_words, ctx.padding_id = len(weight_VD), padding_id
        ctx.set_materialize_grads(False)
        return embedded_BSD, weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[None, None, Tensor | None, None]:
        # The head's gradient is changed in place: only the loss has made it, and does not use it
        # any more.
        grad_BSD, grad_VD = grad_outputs
        (ids_BS,) = ctx.saved_tensors
        if grad_BSD is None:
            return None, None, grad_VD, None
        if grad_VD is not None and attention.compute_capability(grad_VD) is None:
            if ctx.padding_id is not None:
                grad_BSD = grad_BSD.masked_fill((ids_BS == ctx.padding_id).unsqueeze(-1), 0)
            return (
                None,
                None,
                grad_VD.index_add_(0, ids_BS.flatten(), grad_BSD.flatten(0, -2)),
                None,
            )
        padding_id = -1 if ctx.padding_id is None else ctx.padding_id
        # On a GPU index_add_ adds in no fixed order, so a run could not be repeated bit for bit.
        rows_VD = torch.ops.aten.embedding_dense_backward(
            grad_BSD, ids_BS, ctx.num_words, padding_id, False
        )
        return None, None, rows_VD if grad_VD is None else grad_VD.add_(rows_VD), None
