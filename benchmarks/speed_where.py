"""Where the time of a run goes: the parts of a step, what stands between steps, and the machine's matrix products.

python benchmarks/speed_where.py                          both models, 3 to 10 minutes on one core
python benchmarks/speed_where.py --model SmolLM2-135M     one of them

The same steps are run three times: once to warm up, for a run takes its memory from the system in its first steps; then
as fitune's own loop runs them, with prefetched batches; then with the fastest of the model's own matrix products timed
just before each forward and each backward. That is the peak which they are held against, for a shared machine's speed
moves by a half within seconds. FLOPs are those of useful tokens alone: no padding, no head where nothing is supervised,
attention up to the diagonal, backward twice the forward.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fitune.data.batches import prefetch
from fitune.data.rows import Batch, MicroBatch, Row
from fitune.model.load import load_model
from fitune.objectives.supervised import Supervised
from fitune.step import work as step_module
from fitune.step.assemble import Setup, assemble, choose_precision
from speed_trainers import CPU, Task, dialogue_rows, task_config

RESULTS = Path(__file__).parent / "results" / "speed_where.json"
PARTS = ("forward", "backward", "clip", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Where:
    """parts: CPU seconds of all steps; wall_seconds: from the start of the first to the end of the last.
    waited_seconds: wall time in which no step was running. probed_seconds: CPU seconds of the steps among probes;
    peak_seconds: what their useful FLOPs would have taken at the rates of the probes beside them. operators: share of
    the profiled step, the largest first."""

    model: str
    tokens: int
    parts: dict[str, float]
    step_seconds: float
    wall_seconds: float
    waited_seconds: float
    useful_flops: float
    probed_seconds: float
    peak_seconds: float
    operators: dict[str, float]

    @property
    def own_work_fraction(self) -> float:
        return sum(self.parts[part] for part in PARTS) / self.parts["whole"]

    @property
    def peak_fraction(self) -> float:
        return self.peak_seconds / self.probed_seconds


def measure(task: Task) -> Where:
    config = task_config(task)
    precision = choose_precision(config.model, CPU)
    model = load_model(config.model, CPU, precision=precision).train()
    setup = assemble(model, config, device=CPU, precision=precision)
    batches = list(_batches(dialogue_rows(task), task.rows_per_step))
    for batch in batches:
        run_step(setup, setup.layout.split(batch))
    seconds, tokens, waited = defaultdict[str, float](float), 0, 0.0
    begin = end = time.perf_counter()
    with _timed_parts(setup, seconds):
        for batch, micro_batches in prefetch(
            ((batch, setup.layout.split(batch)) for batch in batches), depth=2
        ):
            waited += time.perf_counter() - end
            cpu = time.process_time()
            run_step(setup, micro_batches)
            seconds["whole"] += time.process_time() - cpu
            tokens += batch.num_tokens
            end = time.perf_counter()
    probed_seconds, peak_seconds = _among_probes(setup, batches)
    return Where(
        model=task.model,
        tokens=tokens,
        parts={name: seconds[name] for name in (*PARTS, "whole")},
        step_seconds=end - begin - waited,
        wall_seconds=end - begin,
        waited_seconds=waited,
        useful_flops=sum(useful_flops(model, batch) for batch in batches),
        probed_seconds=probed_seconds,
        peak_seconds=peak_seconds,
        operators=_profile(setup, setup.layout.split(batches[-1])),
    )


def run_step(setup: Setup, micro_batches: Sequence[MicroBatch]) -> None:
    step_module.train_step(setup.model, setup.optimizer, micro_batches, settings=setup.settings)


def useful_flops(model: Any, batch: Batch) -> float:
    """Of forward and backward: 6 for each weight of a layer and token, and of the head and supervised token; attention
    has two products of length * (length + 1) / 2 pairs in each layer."""
    config = model.config
    head_weights = config.vocab_size * config.hidden_size
    layer_weights = sum(
        weight.numel()
        for layer in model.model.layers
        for weight in layer.parameters()
        if weight.ndim == 2
    )
    query_size = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = sum(len(row) * (len(row) + 1) / 2 for row in batch.rows)
    attention = 3 * 2 * 2 * query_size * pairs * config.num_hidden_layers
    return (
        6.0 * (layer_weights * batch.num_tokens + head_weights * batch.num_supervised_tokens)
        + attention
    )


class Probe:
    """The fastest matrix product of the first layer's weights, of its forward and both of its backward.
    Called, it gives the FLOPs in a CPU second that this product reaches now; `seconds` adds up what that took."""

    def __init__(self, model: Any, tokens: int = 1024) -> None:
        rates: list[tuple[float, Callable[[], Any], float]] = []
        for weight_OI in (
            weight.detach() for weight in model.model.layers[0].parameters() if weight.ndim == 2
        ):
            inputs_TI, gradient_TO = (
                torch.randn(tokens, weight_OI.shape[1]),
                torch.randn(tokens, weight_OI.shape[0]),
            )
            flops = 2.0 * tokens * weight_OI.numel()
            for first, second in (
                (inputs_TI, weight_OI.T),
                (gradient_TO, weight_OI),
                (gradient_TO.T, inputs_TI),
            ):
                product = partial(torch.mm, first, second)
                rates.append((flops / _fastest(product), product, flops))
        _, self._product, self._flops = max(rates, key=lambda rate: rate[0])
        self.seconds = 0.0

    def __call__(self) -> float:
        begin = time.process_time()
        rate = self._flops / _fastest(self._product)
        self.seconds += time.process_time() - begin
        return rate


def _fastest(work: Callable[[], Any]) -> float:
    """CPU seconds: of several, since the first finds its operands outside of the caches."""
    return min(_cpu_seconds(work) for _ in range(5))


def _among_probes(setup: Setup, batches: Sequence[Batch]) -> tuple[float, float]:
    """(CPU seconds of the steps without the probes, CPU seconds of their useful FLOPs at the probes' rates)"""
    probe, rates = Probe(setup.model), []
    seconds, peak_seconds = 0.0, 0.0

    def after_a_probe(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            rates.append(probe())
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for place, name in ((Supervised, "loss_sum"), (torch.autograd, "backward")):
            stack.enter_context(patch.object(place, name, after_a_probe(getattr(place, name))))
        for batch in batches:
            rates.clear()
            seconds += _cpu_seconds(partial(run_step, setup, setup.layout.split(batch)))
            peak_seconds += useful_flops(setup.model, batch) * fmean(1 / rate for rate in rates)
    return seconds - probe.seconds, peak_seconds


def _cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


@contextmanager
def _timed_parts(setup: Setup, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the CPU time of the step's four calls to `seconds`."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.process_time() - begin

        return call

    with ExitStack() as stack:
        for part, place, name in (
            ("forward", Supervised, "loss_sum"),
            ("backward", torch.autograd, "backward"),
            ("clip", nn.utils, "clip_grad_norm_"),
            ("optimizer", setup.optimizer, "step"),
        ):
            stack.enter_context(patch.object(place, name, timed(part, getattr(place, name))))
        yield


def _profile(
    setup: Setup, micro_batches: Sequence[MicroBatch], *, largest: int = 12
) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_step(setup, micro_batches)
    events = profile.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)[:largest]
    return {event.key: event.self_cpu_time_total / whole for event in ranked}


def _batches(rows: Sequence[Row], rows_per_step: int) -> Iterator[Batch]:
    for first in range(0, len(rows), rows_per_step):
        yield Batch(tuple(rows[first : first + rows_per_step]))


def render(where: Where) -> str:
    lines = [
        f"{where.model}: {where.tokens:,} tokens, {where.tokens / where.parts['whole']:.0f} tokens/CPU s",
        f"  a step's own work {where.own_work_fraction:.1%} of its time; waited for data {where.waited_seconds:.3f} s "
        f"of {where.wall_seconds:.1f} s",
        *(f"  {part:10} {where.parts[part] / where.parts['whole']:6.1%}" for part in PARTS),
        f"  {where.useful_flops / where.probed_seconds / 1e9:.1f} GFLOP/s of useful work, {where.peak_fraction:.1%} of "
        f"the {where.useful_flops / where.peak_seconds / 1e9:.1f} of the matrix products beside it",
        *(f"  {share:6.1%} {name}" for name, share in where.operators.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("minimind2-small", "SmolLM2-135M"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = (
        Task(model="minimind2-small", max_length=768, num_steps=4),
        Task(model="SmolLM2-135M", max_length=768, rows_per_step=4, num_steps=4),
    )
    results = (
        {each["model"]: each for each in json.loads(RESULTS.read_text())}
        if RESULTS.exists()
        else {}
    )
    for task in tasks:
        if options.model in (None, task.model):
            where = measure(task)
            results[task.model] = asdict(where) | {
                "own_work_fraction": where.own_work_fraction,
                "peak_fraction": where.peak_fraction,
            }
            print(render(where), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(list(results.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
