"""Weighs `model.compile` for a setting: what it saves of a step, against the time that compiling takes.

Compiled layers need fewer launches, which is worth something only where a card waits for them. What
compiled kernels save of the card's own time is not counted.
"""

import math
from collections.abc import Sequence

from fitune.planning.cost import OpCost
from fitune.units import format_seconds

#: Launches of a compiled layer, forward and backward, that are neither products nor attention.
#: Counted on a rehearsed card (docs/rehearsal.md, Triton): 15 in minimind2-small and minimind2, 16 in
#: Qwen2.5-0.5B with LoRA.
COMPILED_KERNELS = 16
#: What the Python around a compiled layer costs, in launches: the difference between the launches
#: that compiling saves and the processor time that it saves, Qwen2.5-0.5B with LoRA, rehearsed.
COMPILED_OVERHEAD = 15
#: All layers of a kind are compiled once. Measured on two shared cores for Qwen2.5-0.5B with LoRA:
#: 46 s of processor time, and Triton's compilations in processes beside it.
COMPILE_SECONDS = 60.0
#: a smaller part of a step is not worth a note that says how much
LEAST_SHARE = 0.03
#: They launch nothing, or stay outside of compiled layers: weights are cast before a layer,
#: gradients are added after it, and norms are read from them.
_NOT_FUSED = {
    *("aten.empty_like", "aten.new_empty", "aten.empty.memory_format"),
    *("aten._foreach_copy_", "aten.add_", "aten.dot"),
}


def saved_launches(works: Sequence[OpCost], num_layers: int) -> float:
    """Return the launches that compiled layers save of a micro-batch; below 0 where they add some.

    An operator that is in every layer has so many calls or a multiple; the rest is outside.
    """
    fused = sum(
        math.floor(work.launches / num_layers + 1e-6) * num_layers
        for work in works
        if work.flops == 0 and work.op not in _NOT_FUSED
    )
    return fused - num_layers * (COMPILED_KERNELS + COMPILED_OVERHEAD)


def compile_note(seconds: float, compiled_seconds: float, *, num_steps: float | None) -> str:
    """Return what a plan says of `model.compile`, as a message.

    seconds: of a step.
    num_steps: of the run; None where its length is not known.
    """
    saved = seconds - compiled_seconds
    whole_ms, saved_ms, compiling = (_ms(seconds), _ms(saved), f"{COMPILE_SECONDS:.0f}")
    if saved < LEAST_SHARE * seconds:
        return (
            f"model.compile=true would save nothing of the {whole_ms} ms of a step (predicted, not "
            "measured)"
        )
    if num_steps is None:
        return (
            f"model.compile=true would save about {saved_ms} ms of the {whole_ms} ms of a step, and "
            f"compiling takes about {compiling} s (predicted, not measured): worth it from "
            f"{math.ceil(COMPILE_SECONDS / saved):,} steps on"
        )
    of_run = format_seconds(num_steps * saved)
    if num_steps * saved > COMPILE_SECONDS:
        return (
            f"model.compile=true would save about {saved_ms} ms of the {whole_ms} ms of a step, and "
            f"compiling takes about {compiling} s (predicted, not measured): worth it, {of_run} "
            "over this run"
        )
    return (
        f"model.compile=true would save about {saved_ms} ms of the {whole_ms} ms of a step, and "
        f"compiling takes about {compiling} s (predicted, not measured): not worth it, {of_run} "
        "over this run"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:{'.3g' if seconds < 1 else ',.0f'}}"
