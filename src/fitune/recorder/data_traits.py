"""Classify operators by what a recording without data has to do about them."""

import re
from typing import Any, NamedTuple

import torch

from fitune.recorder.operators import by_operator

aten = torch.ops.aten

SAME_ELEMENTS = {
    packet
    for name in [
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "expand",
        "clone",
        "_to_copy",
        "detach",
        "alias",
        "lift_fresh",
        "copy",
        "contiguous",
        "flatten",
        "max",
        "amax",
        "min",
        "amin",
        "unbind",
        "split",
    ]
    if (packet := getattr(aten, name, None)) is not None
}


TRUTH = {
    aten.isfinite: 1.0,
    aten.isnan: 0.0,
    aten.isinf: 0.0,
    aten.isin: 0.0,
    aten.all: 1.0,
    aten.ne: 1.0,
}


#: operator -> the value of an operand that alone decides the result: generation ends when it is
#: long enough, whatever its tokens are
DECIDED_BY = {
    aten.bitwise_or: 1.0,
    aten.logical_or: 1.0,
    aten.bitwise_and: 0.0,
    aten.logical_and: 0.0,
}


INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


#: None before torch 2.8
GROUPED_MM = getattr(aten, "_grouped_mm", None)

_SPECIAL = {
    *INDEXING,
    *(
        aten._local_scalar_dense,
        aten.nonzero,
        aten.masked_select,
        aten.bincount,
        GROUPED_MM,
        aten.equal,
    ),
    aten.histc,
}


_GIVES_ORIGIN = {
    *(SAME_ELEMENTS | TRUTH.keys() | DECIDED_BY.keys()),
    *(
        aten.mul,
        aten.topk,
        aten._amp_foreach_non_finite_check_and_unscale_,
        aten.full,
        aten.scatter_,
        aten.scatter,
        aten.eq,
    ),
    *(aten.sum, aten.count_nonzero, aten.any, aten.gt, aten.ge, aten.logical_not, aten.bitwise_not),
}


_MAKES_SPARSE = re.compile(r"sparse_(coo|csr|csc|bsr|bsc|compressed)_tensor|::_?to_sparse")


class OperatorTraits(NamedTuple):
    """How an operator is handled."""

    #: whether `Assumptions` has a result of its own for it
    is_special: bool
    #: whether something can be known about its result's elements without their data
    gives_origin: bool
    #: whether it writes into its arguments
    is_mutable: bool
    #: whether it cannot run without its arguments' data
    needs_data: bool
    #: whether it makes a sparse tensor
    is_sparse: bool


@by_operator
def traits_of(func: Any) -> OperatorTraits:
    """Return the operator's traits, computed once for each operator."""
    packet = func.overloadpacket
    needs_data = not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(
        func.tags
    )
    # Indexing needs data for masks only, and `Assumptions` replaces these by indices.
    needs_data &= packet not in INDEXING
    is_sparse = _MAKES_SPARSE.search(func._schema.name) is not None
    return OperatorTraits(
        packet in _SPECIAL, packet in _GIVES_ORIGIN, func._schema.is_mutable, needs_data, is_sparse
    )
