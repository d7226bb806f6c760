"""The rows of a step dealt over two processes, each with its own micro-batches and failures: the same gradient."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import failing, out_of_memory
from fitune.batch_size.norms import GradientNorms, NormRecorder
from fitune.config import Recompute
from fitune.data.packing import lay_out, split
from fitune.data.rows import Batch, MicroBatch
from fitune.data.split_by_rank import split_by_rank
from fitune.data.unpacking import without_rows
from fitune.distributed.processes import joined
from fitune.model.recompute import set_recompute
from fitune.recovery.protection import Protection
from fitune.recovery.step import SafeResult, safe_step
from fitune.run.journal import plan_parts
from fitune.step.peers import SharedSamples
from fitune.step.work import micro_batch_work
from tiny_ranks import run_ranks
from tiny_steps import Capture, distance, make_batch, make_model, settings_for

LONG_ROW = 1  # of 40 tokens, so the longest; dealt to rank 0
BATCH = make_batch()


class Watching(Capture):
    """Sees which parameters have a gradient."""

    present: tuple[bool, ...] = ()

    def step(self, closure: Any = None) -> None:
        self.present = tuple(p.grad is not None for p in self.param_groups[0]["params"])
        super().step(closure)


@dataclass(frozen=True)
class Case:
    """rows: of a micro-batch, by rank. fault: what fails on rank 1, on which calls. never: rows that find no memory."""

    batch: Batch = BATCH
    commit: bool = False
    rows: tuple[int, int] = (2, 2)
    fault: tuple[str, tuple[int, ...]] | None = None
    never: tuple[int, ...] = ()
    lora: bool = False
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    recompute: Recompute = "off"
    packed: bool = True


TWICE = ("backward of layer 0", (0, 1))
CASES = {
    "unequal rows": Case(),
    "unequal rows, committed": Case(commit=True),
    "different micro-batches": Case(rows=(1, 7)),
    "out of memory twice": Case(fault=TWICE),
    "out of memory twice, committed": Case(fault=TWICE, commit=True),
    "out of memory when all rows are done": Case(fault=("sum", (0,)), commit=True),
    "an empty shard": Case(Batch(BATCH.rows[:1])),
    "an empty shard, committed": Case(Batch(BATCH.rows[:1]), commit=True),
    "a row left out": Case(never=(LONG_ROW,)),
    "a row left out, committed": Case(never=(LONG_ROW,), commit=True),
}
for _commit in (False, True):
    _kept = ", committed" if _commit else ""
    CASES |= {
        f"forward fails once{_kept}": Case(fault=("forward of layer 1", (1,)), commit=_commit),
        f"forward fails twice, LoRA, dropout{_kept}": Case(
            fault=("forward of layer 1", (0, 1)), commit=_commit, lora=True, dropout=0.3
        ),
        f"backward fails twice, bfloat16{_kept}": Case(
            fault=TWICE, commit=_commit, dtype=torch.bfloat16
        ),
        f"backward fails twice, LoRA in bfloat16, dropout{_kept}": Case(
            fault=TWICE, commit=_commit, lora=True, dtype=torch.bfloat16, dropout=0.3
        ),
        f"backward fails twice, recomputed, dropout{_kept}": Case(
            fault=TWICE, commit=_commit, recompute="full", dropout=0.3
        ),
        f"backward fails twice, recomputed in parts{_kept}": Case(
            fault=TWICE, commit=_commit, recompute="selective"
        ),
        f"the loss fails twice, padded{_kept}": Case(
            fault=("loss", (0, 1)), commit=_commit, packed=False
        ),
    }
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}  # see test_safe_step.py
EMPTY = Case(Batch(BATCH.rows[:2]), never=(0, 1))


@dataclass(frozen=True)
class Outcome:
    gradient: torch.Tensor
    present: tuple[bool, ...]
    result: SafeResult
    norms: GradientNorms | None
    quarantined: frozenset[int]
    streams_stay: bool = True


def protect(case: Case) -> tuple[Protection[MicroBatch], Watching]:
    model = make_model(lora=case.lora).to(case.dtype).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = case.dropout
    set_recompute(model, case.recompute)
    for name in ("of_first_rows", "of_no_row"):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(3, dtype=torch.float32)))
    optimizer = Watching(model.parameters())
    work = micro_batch_work(
        model, optimizer, replace(settings_for(model, "full"), commit=case.commit)
    )

    def loss_share(piece: MicroBatch, loss_weight: float) -> torch.Tensor:
        if set(piece.row_ids) & set(case.never):
            raise out_of_memory()
        loss = work.loss_share(piece, loss_weight)
        weight = torch.tensor([5.0, 6.0, 7.0]) / loss_weight
        return loss + (model.of_first_rows * weight).sum() if 0 in piece.row_ids else loss

    return Protection(
        work=replace(work, loss_share=loss_share), quarantine=bool(case.never)
    ), optimizer


def alone(case: Case, pieces: list[MicroBatch]) -> Outcome:
    """The same rows in one process, without failures."""
    kept = [rest for piece in pieces if (rest := without_rows(piece, case.never)) is not None]
    protection, optimizer = protect(replace(case, never=()))
    norms = NormRecorder(optimizer)
    result = safe_step(protection, kept, step=1, norms=norms)
    return Outcome(optimizer.vector(), optimizer.present, result, result.step.norms, frozenset())


def be_rank(place: Path) -> int:
    """Every case in turn; the outcomes go to a file."""
    outcomes = {}
    with joined() as ranks:
        ranks.connect(torch.device("cpu"))
        for name, case in (CASES | {"nothing": EMPTY}).items():
            protection, optimizer = protect(case)
            fault = case.fault if ranks.rank == 1 else None
            pieces = parts_of(case)[ranks.rank]
            peers = SharedSamples(ranks, case.batch.loss_weight)
            stream = torch.get_rng_state()
            with failing(
                protection.work.model, fault[0] if fault else "loss", *(fault[1] if fault else ())
            ):
                norms = NormRecorder(optimizer)
                result = safe_step(
                    protection, pieces, step=1, fits=lambda _: True, norms=norms, peers=peers
                )
            streams_stay = torch.equal(torch.get_rng_state(), stream)
            gradient = optimizer.vector() if optimizer.gradients else torch.zeros(1)
            left_out = frozenset(protection.quarantined)
            outcomes[name] = Outcome(
                gradient, optimizer.present, result, result.step.norms, left_out, streams_stay
            )
        (place / f"{ranks.rank}.pickle").write_bytes(pickle.dumps(outcomes))
    return 0


def parts_of(case: Case) -> list[list[MicroBatch]]:
    parts = zip(split_by_rank(case.batch, 2), case.rows, strict=True)
    return [split(part, packed=case.packed, micro_rows=rows) for part, rows in parts]


def as_planned(case: Case, outcome: Outcome) -> Outcome:
    """One process, without failures, in the micro-batches that it came to."""
    rows = {row.row_id: row for row in case.batch.rows}
    plan = [row_ids for part in plan_parts(outcome.result.plan) for row_ids in part]
    return alone(
        case, [lay_out([rows[row] for row in row_ids], packed=case.packed) for row_ids in plan]
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """By rank."""
    place = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        assert run_ranks(be_rank, place) == [0, 0], (place / "1.err").read_text()
    return [pickle.loads((place / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_one_process(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    case, tolerance = CASES[name], TOLERANCE[CASES[name].dtype]
    expected = as_planned(case, outcomes[0][name])
    for each in (rank[name] for rank in outcomes):
        assert each.streams_stay
        assert distance(each.gradient, expected.gradient) < tolerance
        assert each.present == expected.present
        assert each.present[:2] == (True, False)  # of one rank's rows alone, and of no row
        assert each.result.step.loss == pytest.approx(expected.result.step.loss, rel=tolerance)
        assert each.result.step.grad_norm == pytest.approx(
            expected.result.step.grad_norm, rel=tolerance
        )
        assert each.result.step.loss_weight == expected.result.step.loss_weight


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.dropout])
def test_no_split_changes_the_gradient_or_loses_a_row(
    name: str, outcomes: list[dict[str, Outcome]]
) -> None:
    """As it was asked for, before anything failed. Dropout's masks belong to the split."""
    case = CASES[name]
    expected = alone(case, [piece for part in parts_of(case) for piece in part])
    result = outcomes[0][name].result
    assert distance(outcomes[0][name].gradient, expected.gradient) < TOLERANCE[case.dtype]
    kept = sorted(row for row in case.batch.row_ids if row not in case.never)
    assert sorted(row for row_ids in result.plan for row in row_ids) == kept


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_same_bits(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    first, second = (rank[name] for rank in outcomes)
    assert torch.equal(first.gradient, second.gradient)
    assert first.result.step == second.result.step
    assert first.result.plan == second.result.plan


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.dtype == torch.float32]
)
def test_the_noise_is_measured_over_the_micro_batches_of_all_ranks(
    name: str, outcomes: list[dict[str, Outcome]]
) -> None:
    norms, case = outcomes[0][name].norms, CASES[name]
    assert norms is not None
    expected = as_planned(case, outcomes[0][name])
    assert expected.norms is not None
    assert norms.micro == pytest.approx(expected.norms.micro, rel=1e-5)
    assert norms.total == pytest.approx(expected.norms.total, rel=1e-5)
    assert norms.weights == expected.norms.weights


def test_the_plan_tells_the_micro_batches_of_each_rank(outcomes: list[dict[str, Outcome]]) -> None:
    plan = outcomes[1]["different micro-batches"].result.plan
    first, second = plan_parts(plan)
    assert set(map(len, first)) == {1}
    assert len(second) == 1
    assert sorted(row for ids in plan for row in ids) == list(range(len(BATCH.rows)))
    assert plan_parts(outcomes[0]["an empty shard"].result.plan) == (((0,),), ())


def test_each_rank_retries_alone(outcomes: list[dict[str, Outcome]]) -> None:
    first, second = (rank["out of memory twice"].result for rank in outcomes)
    assert (len(first.failures), len(second.failures)) == (0, 2)
    assert outcomes[1]["out of memory when all rows are done"].result.failures[0].place == "sum"


def test_a_row_that_one_rank_leaves_out_is_left_out_by_all(
    outcomes: list[dict[str, Outcome]],
) -> None:
    for rank in outcomes:
        assert rank["a row left out"].quarantined == {LONG_ROW}
        assert rank["a row left out"].result.quarantined == (LONG_ROW,)


def test_a_step_of_which_nothing_is_left_updates_no_rank(
    outcomes: list[dict[str, Outcome]],
) -> None:
    for rank in outcomes:
        assert not rank["nothing"].result.step.updated
        assert rank["nothing"].result.step.loss is None
        assert rank["nothing"].quarantined == {0, 1}
