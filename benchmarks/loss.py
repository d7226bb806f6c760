"""The head and its loss computed in several ways: CPU seconds, peak memory and gradients, of one forward and backward.

python benchmarks/loss.py      about a minute on one core; writes benchmarks/results/loss.json

full      all logits at once, the oracle
fitune    objectives/supervised.py: chunks of positions, the gradient taken in the logits' own memory
torch     torch.nn.functional.linear_cross_entropy (torch 2.13), its chunks set to the same number of positions
auto      the same with the chunks that it chooses itself, where that ends in reasonable time

Memory is the peak of what torch's operators hold above the inputs, gradients included.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitune.data.packing import lay_out
from fitune.data.rows import MicroBatch, Row
from fitune.model.head import Head
from fitune.objectives.objective import CHUNK_TOKENS, Chunking
from fitune.objectives.supervised import chunked_cross_entropy

RESULTS = Path(__file__).parent / "results" / "loss.json"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """positions: supervised ones. auto: whether torch's own choice of chunks is measured too."""

    positions: int
    vocab_size: int
    hidden_size: int
    auto: bool = True


SHAPES = (
    Shape(positions=2048, vocab_size=6_400, hidden_size=512),
    Shape(positions=512, vocab_size=49_152, hidden_size=576),
    Shape(positions=320, vocab_size=151_936, hidden_size=1_024, auto=False),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """relative_error: of the gradients of hidden states and weight against those of full logits, the larger."""

    way: str
    cpu_seconds: float
    peak_bytes: int
    loss: float
    loss_dtype: str
    relative_error: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    hidden_ND: Tensor
    output: nn.Linear
    micro_batch: MicroBatch

    @property
    def weight_VD(self) -> Tensor:  # noqa: N802 a shape suffix
        return self.output.weight


def make_case(shape: Shape, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(shape.positions, shape.hidden_size, generator=generator)
    weight_VD = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.05
    ids = (
        torch.randint(0, shape.vocab_size, (shape.positions + 1,), generator=generator)
        .int()
        .numpy()
    )
    weights = torch.ones(shape.positions + 1).numpy()
    micro_batch = lay_out([Row(0, ids, weights)], packed=True)
    output = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
    output.weight = nn.Parameter(weight_VD.to(dtype))
    return Case(hidden_ND.to(dtype).requires_grad_(), output, micro_batch)


def full(case: Case) -> Tensor:
    logits_NV = F.linear(case.hidden_ND, case.weight_VD)
    return F.cross_entropy(logits_NV.float(), case.micro_batch.target_ids_N, reduction="sum")


def fitune(case: Case) -> Tensor:
    head = Head(nn.Identity(), case.output, 1.0, None)
    chunks = Chunking(CHUNK_TOKENS).slices(len(case.hidden_ND))
    return chunked_cross_entropy(case.hidden_ND, head, case.micro_batch, chunks=chunks)


def in_torch(case: Case, chunk: int | None = CHUNK_TOKENS) -> Tensor:
    options = (
        nn.LinearCrossEntropyOptions()
        if chunk is None
        else nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    )
    loss: Tensor = F.linear_cross_entropy(
        case.hidden_ND,
        case.weight_VD,
        case.micro_batch.target_ids_N,
        reduction="sum",
        options=options,
    )
    return loss


def measure(
    way: str, compute: Callable[[Case], Tensor], case: Case, *, repeats: int = 3
) -> tuple[Measured, Tensor]:
    """Also the gradients, in one vector."""
    seconds = []
    for _ in range(repeats):
        case.hidden_ND.grad = case.weight_VD.grad = None
        begin = time.process_time()
        loss = compute(case)
        loss.backward()
        seconds.append(time.process_time() - begin)
    assert case.hidden_ND.grad is not None
    assert case.weight_VD.grad is not None
    gradient = torch.cat([case.hidden_ND.grad.flatten(), case.weight_VD.grad.flatten()]).double()
    measured = Measured(
        way=way,
        cpu_seconds=min(seconds),
        peak_bytes=_peak_bytes(compute, case),
        loss=loss.item(),
        loss_dtype=str(loss.dtype).removeprefix("torch."),
    )
    return measured, gradient


def _peak_bytes(compute: Callable[[Case], Tensor], case: Case) -> int:
    case.hidden_ND.grad = case.weight_VD.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        compute(case).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare(shape: Shape, *, repeats: int = 3) -> list[Measured]:
    ways: dict[str, Callable[[Case], Tensor]] = {"full": full, "fitune": fitune}
    if hasattr(F, "linear_cross_entropy"):
        ways["torch"] = in_torch
        if shape.auto:
            ways["auto"] = lambda case: in_torch(case, None)
    case = make_case(shape)
    found, oracle = measure("full", full, case, repeats=repeats)
    results = [found]
    for way in list(ways)[1:]:
        found, gradient = measure(way, ways[way], case, repeats=repeats)
        error = float((gradient - oracle).abs().max() / oracle.abs().max())
        results.append(Measured(**asdict(found) | {"relative_error": error}))
    return results


def render(shape: Shape, results: Sequence[Measured]) -> str:
    lines = [
        f"{shape.positions:,} positions, {shape.vocab_size:,} words, {shape.hidden_size:,} wide"
    ]
    for each in results:
        error = (
            "oracle" if each.relative_error is None else f"gradient {each.relative_error:.1e} off"
        )
        lines.append(
            f"  {each.way:7} {each.cpu_seconds:6.2f} s {each.peak_bytes / 1e6:7,.0f} MB  {error}"
        )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    everything = []
    for shape in SHAPES:
        results = compare(shape, repeats=1 if shape.vocab_size > 100_000 else 3)
        print(render(shape, results), flush=True)
        everything.append({"shape": asdict(shape), "ways": [asdict(each) for each in results]})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
