"""What one call of an operator computes and moves, from the shapes of its tensors."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from fitune.trace.operators import by_operator


def moved_bytes(func: Any, args: Any, outputs: tuple[torch.Tensor, ...]) -> int:
    """Of the tensors that are read and written, each once; of a broadcast one what it really holds, and of a tensor
    that is looked up or added to in places those places."""
    if (own := _own_moved(func)) is not None:
        return own(args, outputs)
    sizes = {}
    for tensor in (*tensors_in(args), *outputs):
        sizes[id(tensor)] = min(
            tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        )
    return sum(sizes.values())


def count_flops(func: Any, args: Any, kwargs: Any, outputs: tuple[torch.Tensor, ...]) -> int:
    """By torch.utils.flop_counter's formulas for products and attention, two for a multiplication and an addition; 0
    for other operators. Attention counts all pairs of positions, although a causal kernel skips half of them."""
    own, formula = _flop_formulas(func)
    if own is not None:
        return own(args, outputs)
    if formula is None:
        return 0
    return int(formula(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else outputs))


def _varlen(products: int, longest: int) -> Callable[[Any, Any], int]:
    """Flat positions [T, H, d] against rows that are no longer than the longest, which argument number `longest` is."""

    def flops(args: Any, _: Any) -> int:
        return products * 2 * _size(args[0]) * int(args[longest])

    return flops


def _on_cpu(products: int, query: int) -> Callable[[Any, Any], int]:
    """[B, H, S, d]; argument number `query`, and the keys behind it."""
    return lambda args, _: products * 2 * _size(args[query]) * int(args[query + 1].shape[-2])


def _grouped(args: Any, _: Any) -> int:
    """Each row is multiplied by the matrix of its group; for the weights' gradient the groups share the columns."""
    return 2 * _size(args[0]) * int(args[1].shape[-1])


def _added(args: Any, _: Any) -> int:
    """A product that is added to what is there, which the registry has for new results alone."""
    return 2 * _size(args[1]) * int(args[2].shape[-1])


def _convolution_backward(args: Any, _: Any) -> int:
    """For the input and for the weight [out, in / groups, *kernel], each where it is asked for; the registry's formula
    fails where one is not."""
    gradient, source, weight = args[:3]
    transposed, asked = args[7], args[10]
    return (
        2
        * _size(source if transposed else gradient)
        * int(sum(asked[:2]) * math.prod(weight.shape[1:]))
    )


_OWN: dict[str, Callable[[Any, Any], int]] = {
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


def _looked_up(args: Any, outputs: Any) -> int:
    """Each element of the result is read in its place and written; where that is stands in the indices."""
    return 2 * bytes_of(outputs) + bytes_of(args[1:])


def _added_to(source: int, *, copies: bool) -> Callable[[Any, Any], int]:
    """Places of the first argument are read, and written with what argument number `source` adds. copies: all of it
    first, to a result of its own."""
    copied = 2 if copies else 0
    return lambda args, _: (
        copied * bytes_of(args[0]) + bytes_of(args[1:]) + 2 * bytes_of(args[source])
    )


def _updated(num_states: int) -> Callable[[Any, Any], int]:
    """Parameters and their states are read and written, their gradients are read."""
    return lambda args, _: 2 * bytes_of((args[0], args[2 : 2 + num_states])) + bytes_of(args[1])


_MOVED: dict[str, Callable[[Any, Any], int]] = {
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
    "aten::nll_loss_backward": lambda args, outputs: (
        bytes_of(outputs) + 2 * bytes_of(args[2])
    ),  # zeros, mostly
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
def _own_moved(func: Any) -> Callable[[Any, Any], int] | None:
    return _MOVED.get(func._schema.name)


@by_operator
def _flop_formulas(func: Any) -> tuple[Callable[[Any, Any], int] | None, Any]:
    """Ours, and the registry's."""
    return _OWN.get(func._schema.name), flop_registry.get(func.overloadpacket)


def bytes_of(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tree))


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)
