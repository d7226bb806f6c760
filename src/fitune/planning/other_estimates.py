"""Computes what other estimators say of the same setting, for comparison only.

They are formulas over the model's shape:

- accelerate 1.x, `accelerate estimate-memory` (commands/estimate.py, `estimate_training_usage`):
  the model's bytes in float32, times 4 for Adam in float32, times 2 in mixed precision, where it
  takes the largest of its parts.
- DeepSpeed, ZeRO-2 without offload on one card (runtime/zero/stage_1_and_2.py,
  `estimate_zero2_model_states_mem_needs`): 4 + 16 bytes for each parameter, without activations.
- Korthikanti et al. 2022 (arXiv 2205.05198): the 16-bit activations of a transformer layer whose
  attention saves no scores take 34 s b h bytes (equation 1 without its 5 a s / h term), and 2 s b h
  bytes with gradient checkpointing.
"""

from collections.abc import Iterator, Mapping

from fitune.planning.plan import OtherEstimate
from fitune.recorder.events import Category

_STATES: tuple[Category, ...] = ("parameter", "gradient", "optimizer_state")
_RECOMPUTED_SHARE = {"off": 0.0, "every_4": 0.25, "every_2": 0.5, "selective": 0.0, "full": 1.0}


def other_estimates(
    categories: Mapping[Category, int],
    *,
    num_parameters: int,
    method: str,
    precision: str,
    recompute: str,
    positions: int,
    hidden_size: int,
    num_layers: int,
) -> Iterator[OtherEstimate]:
    """Yield each estimate together with our prediction of the same quantity.

    The quantities are the whole peak, the model's states, and its activations.

    categories: the predicted bytes of each category at the peak.
    positions: the tokens of the largest micro-batch, padding included (s b in the formulas).
    """
    total = sum(categories.values())
    states = sum(categories[name] for name in _STATES)
    full = 4 * num_parameters * (4 if precision == "float32" else 2)
    # both count all parameters as trained, which is wrong for adapters
    if method == "full":
        yield OtherEstimate(
            name="accelerate estimate-memory",
            quantity="peak, any batch",
            num_bytes=full,
            predicted_bytes=total,
        )
        yield OtherEstimate(
            name="DeepSpeed ZeRO-2, one card",
            quantity="model states",
            num_bytes=20 * num_parameters,
            predicted_bytes=states,
        )
    share = _RECOMPUTED_SHARE[recompute]
    per_layer = (34 * (1 - share) + 2 * share) * positions * hidden_size
    yield OtherEstimate(
        name="Korthikanti et al. 2022",
        quantity="activations",
        num_bytes=int(per_layer * num_layers),
        predicted_bytes=total - states,
    )
