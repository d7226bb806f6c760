"""Computes what one call of an operator computes and moves, from the shapes of its tensors."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from fitune.recorder.operators import by_operator

Operator = torch._ops.OpOverload


def moved_bytes(func: Operator, args: Any, outputs: tuple[torch.Tensor, ...]) -> int:
    """Return the bytes of the tensors that are read and written, each counted once.

    A broadcast tensor counts with the bytes that it really holds. Where an operator looks up
    elements of a tensor, or adds to some of them, only these count.
    """
    if (own := _own_moved(func)) is not None:
        return own(args, outputs)
    sizes = {}
    for tensor in (*tensors_in(args), *outputs):
        sizes[id(tensor)] = min(
            tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        )
    return sum(sizes.values())


def count_flops(func: Operator, args: Any, kwargs: Any, outputs: tuple[torch.Tensor, ...]) -> int:
    """Return the floating-point operations, two for a multiplication with an addition.

    The formulas for products and attention are those of torch.utils.flop_counter; other operators
    have 0. Attention counts all pairs of tokens, although a causal kernel skips half of them.
    """
    own, formula = _flop_formulas(func)
    if own is not None:
        return own(args, outputs)
    if formula is None:
        return 0
    return int(formula(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else outputs))


def _varlen(products: int, longest: int) -> Callable[[Any, object], int]:
    """Return the formula for attention on packed sequences.

    The queries [T, H, d] of all sequences are multiplied with as many keys as the longest sequence
    has, which is argument number `longest`.
    """

    def flops(args: Any, _: object) -> int:
        return products * 2 * _size(args[0]) * int(args[longest])

    return flops


def _on_cpu(products: int, query: int) -> Callable[[Any, object], int]:
    """Return the formula for attention on [B, H, S, d].

    query: the number of the argument with the queries; the keys follow it
    """
    return lambda args, _: products * 2 * _size(args[query]) * int(args[query + 1].shape[-2])


def _grouped(args: Any, _: object) -> int:
    """Return the operations of a grouped product, where each group of tokens has its own matrix.

    For the gradient of the weights, the groups share the columns.
    """
    return 2 * _size(args[0]) * int(args[1].shape[-1])


def _added(args: Any, _: object) -> int:
    """Return the operations of a product that is added in place, unknown to the registry."""
    return 2 * _size(args[1]) * int(args[2].shape[-1])


def _convolution_backward(args: Any, _: object) -> int:
    """Return the operations for the gradients of the input and of the weight.

    The weight is [out, in / groups, *kernel]. Only those gradients are counted that are requested;
    the registry's formula fails where one is not.
    """
    gradient, source, weight = args[:3]
    transposed, is_requested = args[7], args[10]
    return (
        2
        * _size(source if transposed else gradient)
        * int(sum(is_requested[:2]) * math.prod(weight.shape[1:]))
    )


#: Formulas for what the registry does not have.
_OWN: dict[str, Callable[[Any, object], int]] = {
    "torch_attn::_varlen_attn": _varlen(2, longest=6),
    "torch_attn::_varlen_attn_backward": _varlen(5, longest=9),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _on_cpu(2, query=0),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _on_cpu(5, query=1),
    "aten::_grouped_mm": _grouped,
    "aten::convolution_backward": _convolution_backward,
    "aten::addmm_": _added,
    "aten::baddbmm_": _added,
}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel()


def _looked_up(args: Any, outputs: object) -> int:
    """Return the bytes where each element of the result is read from where the indices say."""
    return 2 * bytes_of(outputs) + bytes_of(args[1:])


def _added_to(source: int, *, copies: bool) -> Callable[[Any, object], int]:
    """Return the formula for operators that read and write some places of the first argument.

    source: the number of the argument that is written or added there
    copies: whether the result is new, so that all of the first argument is copied first
    """
    copied = 2 if copies else 0
    return lambda args, _: (
        copied * bytes_of(args[0]) + bytes_of(args[1:]) + 2 * bytes_of(args[source])
    )


def _updated(num_states: int) -> Callable[[Any, object], int]:
    """Return the formula for an optimizer, which reads gradients and updates the rest."""
    return lambda args, _: 2 * bytes_of((args[0], args[2 : 2 + num_states])) + bytes_of(args[1])


#: Formulas for operators that move other bytes than those of their tensors.
_MOVED: dict[str, Callable[[Any, object], int]] = {
    **dict.fromkeys(
        (
            "aten::zeros_like",
            "aten::ones_like",
            "aten::full_like",
            "aten::new_zeros",
            "aten::new_ones",
        ),
        lambda _, outputs: bytes_of(outputs),
    ),
    **dict.fromkeys(
        ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided"), lambda _, __: 0
    ),
    **dict.fromkeys(
        ("aten::embedding", "aten::gather", "aten::index_select", "aten::index"), _looked_up
    ),
    "aten::_fused_adamw_": _updated(2),
    "aten::_fused_sgd_": _updated(1),
    "aten::nll_loss_forward": lambda args, _: 2 * bytes_of(args[1]),
    # the result is filled with zeros, and one element of each row is written
    "aten::nll_loss_backward": lambda args, outputs: bytes_of(outputs) + 2 * bytes_of(args[2]),
    "aten::embedding_dense_backward": lambda args, outputs: (
        bytes_of(outputs) + 3 * bytes_of(args[:2])
    ),
    "aten::scatter_": _added_to(3, copies=False),
    "aten::scatter_add_": _added_to(3, copies=False),
    "aten::scatter_add": _added_to(3, copies=True),
    "aten::index_add_": _added_to(3, copies=False),
    "aten::index_add": _added_to(3, copies=True),
    "aten::index_put_": _added_to(2, copies=False),
    "aten::index_put": _added_to(2, copies=True),
}


@by_operator
def _own_moved(func: Operator) -> Callable[[Any, object], int] | None:
    return _MOVED.get(func._schema.name)


@by_operator
def _flop_formulas(func: Operator) -> tuple[Callable[[object, object], int] | None, Any]:
    """Return our formula and the registry's, each None if there is none."""
    return _OWN.get(func._schema.name), flop_registry.get(func.overloadpacket)


def bytes_of(tree: Any) -> int:
    """Return the bytes of all tensors in nested lists, tuples and dicts."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tree))


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)
