"""A model dealt over two processes: the same gradient as one process, whatever fails in one of them, and no waiting."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from faults import failing, failing_call
from fitune.batch_size.norms import GradientNorms, NormRecorder
from fitune.config import LoraConfig, Recompute
from fitune.data.packing import lay_out, split
from fitune.data.rows import Batch, MicroBatch
from fitune.data.split_by_rank import split_by_rank
from fitune.distributed.processes import Ranks, joined
from fitune.distributed.sharding import Shards, local, shard_model
from fitune.errors import FituneError, OutOfMemoryError
from fitune.model.load import build_model
from fitune.model.lora import apply_lora
from fitune.model.packed_attention import attention_name
from fitune.model.recompute import set_recompute
from fitune.objectives.supervised import Supervised
from fitune.recovery.evaluate import safe_evaluate
from fitune.recovery.protection import Protection
from fitune.recovery.step import SafeResult, safe_step
from fitune.run.journal import plan_parts
from fitune.step.optimizer_state import create_state
from fitune.step.peers import ALONE, ShardedModel
from fitune.step.work import StepSettings, micro_batch_work
from tiny_models import TINY
from tiny_ranks import run_ranks
from tiny_steps import distance, make_batch, settings_for

BATCH = make_batch()
EVAL_FAULT = (0,)
GATHER = "torch.distributed.fsdp._fully_shard._fsdp_collectives.DefaultAllGather.allocate"
COPY_OUT = "torch.distributed.fsdp._fully_shard._fsdp_param_group.foreach_all_gather_copy_out"
REDUCE = "torch.distributed.fsdp._fully_shard._fsdp_collectives.DefaultReduceScatter.allocate"


@dataclass(frozen=True)
class Case:
    """rows: of a micro-batch, by rank. fault: what fails on rank 1, on which calls. Odd sizes, so that no shard is like
    another."""

    batch: Batch = BATCH
    rows: tuple[int, int] = (2, 2)
    fault: tuple[str, tuple[int, ...]] | None = None
    family: str = "llama"
    tied: bool = True
    loss: str = "chunked"
    lora: bool = False
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    recompute: Recompute = "off"
    packed: bool = True
    clip: float = 0.0
    scaled: bool = False


CASES = {
    "unequal rows": Case(),
    "other numbers of micro-batches": Case(rows=(1, 7)),
    "an empty shard": Case(Batch(BATCH.rows[:1])),
    "untied": Case(tied=False),
    "full logits": Case(loss="full"),
    "clipped": Case(clip=0.01),
    "experts": Case(family="qwen3_moe", rows=(1, 1)),
    "LoRA": Case(lora=True),
    "LoRA in bfloat16": Case(lora=True, dtype=torch.bfloat16),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16, scaled": Case(scaled=True),
    "recomputed": Case(recompute="full"),
    "recomputed in parts": Case(recompute="selective"),
    "padded": Case(packed=False),
    "forward fails once": Case(fault=("forward of layer 1", (1,))),
    "forward fails twice, LoRA, dropout": Case(
        fault=("forward of layer 1", (0, 1)), lora=True, dropout=0.3
    ),
    "backward fails twice": Case(fault=("backward of layer 0", (0, 1))),
    "backward fails in the second micro-batch": Case(
        fault=("backward of layer 1", (1,)), tied=False
    ),
    "backward fails twice, bfloat16": Case(
        fault=("backward of layer 0", (0, 1)), dtype=torch.bfloat16
    ),
    "backward fails twice, recomputed, dropout": Case(
        fault=("backward of layer 0", (0, 1)), recompute="full", dropout=0.3
    ),
    "the loss fails twice, padded": Case(fault=("loss", (0, 1)), packed=False),
    "a gather finds no memory": Case(fault=(GATHER, (2,))),
    "a gather finds no memory in the backward": Case(fault=(GATHER, (4,)), recompute="full"),
    "what was gathered finds no memory": Case(fault=(COPY_OUT, (1,))),
    "a sum finds no memory": Case(fault=(REDUCE, (1,))),
    "the norm finds no memory": Case(fault=("torch.nn.utils.get_total_norm", (0,))),
    "a process without rows fails": Case(Batch(BATCH.rows[:1]), fault=("forward of layer 0", (0,))),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Whole(torch.optim.AdamW):
    """Keeps the gradients that it is given, whole, and changes nothing."""

    gradients: tuple[torch.Tensor, ...] = ()

    def step(self, closure: Any = None) -> None:
        found = (p.grad for group in self.param_groups for p in group["params"])
        whole = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found)
        self.gradients = tuple(
            grad.double().flatten().clone() for grad in whole if grad is not None
        )


@dataclass(frozen=True)
class Outcome:
    gradient: torch.Tensor
    result: SafeResult
    norms: GradientNorms | None
    streams_stay: bool
    is_sharded_again: bool


def make(case: Case) -> nn.Module:
    odd = {"intermediate_size": 47, "vocab_size": 65, "tie_word_embeddings": case.tied}
    config = TINY[case.family].__class__.from_dict(TINY[case.family].to_dict() | odd)
    model: nn.Module = build_model(config, attention=attention_name(config, "auto"), seed=1)
    if case.lora:
        model = apply_lora(model, LoraConfig(rank=3))  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    if case.dtype != torch.float32:
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(case.dtype)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = case.dropout
    set_recompute(model, case.recompute)
    return model.train()


def settings(model: nn.Module, case: Case) -> StepSettings:
    autocast = case.dtype if case.lora and case.dtype != torch.float32 else None
    if case.scaled:
        autocast = torch.float16
    return replace(settings_for(model, case.loss, clip=case.clip), autocast=autocast)


def idle(packed: bool) -> MicroBatch:
    return lay_out([Supervised().made_up_row(0, np.array([1, 2]), 0)], packed=packed)


def protect(
    case: Case, ranks: Ranks | None = None
) -> tuple[Protection[MicroBatch], Whole, Shards | None]:
    model = make(case)
    step_settings = settings(model, case)
    if ranks is not None:
        shards = shard_model(model, ranks, device=torch.device("cpu"), idle=idle(case.packed))
        step_settings = replace(step_settings, shards=shards)
    optimizer = Whole([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if case.scaled else None
    work = micro_batch_work(model, optimizer, step_settings, scaler=scaler)
    return Protection(work=work), optimizer, step_settings.shards


def alone(case: Case, pieces: list[MicroBatch]) -> Outcome:
    """The same rows in one process, without failures."""
    protection, optimizer, _ = protect(case)
    norms = NormRecorder(optimizer)
    result = safe_step(protection, pieces, step=1, norms=norms)
    return Outcome(torch.cat(optimizer.gradients), result, result.step.norms, True, True)


def one_step(case: Case, ranks: Ranks) -> Outcome:
    protection, optimizer, shards = protect(case, ranks)
    assert shards is not None
    place, calls = case.fault if case.fault is not None and ranks.rank == 1 else ("loss", ())
    patch = (
        failing_call(place, *calls)
        if place.startswith("torch.")
        else failing(protection.work.model, place, *calls)
    )
    stream = torch.get_rng_state()
    sharded = set(map(id, protection.work.model.parameters()))
    with patch:
        result = safe_step(
            protection,
            parts_of(case)[ranks.rank],
            step=1,
            fits=lambda _: True,
            norms=NormRecorder(optimizer, shards=shards),
            peers=ShardedModel(shards, ranks, case.batch.loss_weight),
        )
    return Outcome(
        torch.cat(optimizer.gradients),
        result,
        result.step.norms,
        torch.equal(torch.get_rng_state(), stream),
        sharded == set(map(id, protection.work.model.parameters())),
    )


def evaluated(ranks: Ranks) -> Any:
    protection, _, shards = protect(CASES["unequal rows"], ranks)
    model = protection.work.model
    calls = EVAL_FAULT if ranks.rank == 1 else ()
    with failing(model, "evaluation", *calls):
        found = safe_evaluate(
            model,
            parts_of(Case(rows=(1, 7)))[ranks.rank],
            settings=replace(settings_for(model, "chunked"), shards=shards),
            query_free_bytes=lambda: None,
            shards=shards,
        )
    return found, all(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def sentence(ranks: Ranks, place: str, error: Any) -> str:
    """Of what ends rank 1 for good, in this rank."""
    protection, _, shards = protect(CASES["unequal rows"], ranks)
    assert shards is not None
    calls = range(10**3) if ranks.rank == 1 else ()
    try:
        with failing(
            protection.work.model, place, *calls, **({} if error is None else {"error": error})
        ):
            safe_step(
                protection,
                parts_of(Case())[ranks.rank],
                step=1,
                peers=ShardedModel(shards, ranks, BATCH.loss_weight),
            )
    except Exception as found:
        ranks.send_error(found)
        return f"{type(found).__name__}: {found}"
    return "nothing"


def updated(ranks: Ranks) -> tuple[list[torch.Tensor], float]:
    """(the weights after three steps of AdamW, whole; the share of weights and state that this process holds)."""
    model = make(CASES["untied"])
    step_settings = settings(model, CASES["untied"])
    shards = (
        shard_model(model, ranks, device=torch.device("cpu"), idle=idle(packed=True))
        if ranks.size > 1
        else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    assert create_state(optimizer)
    work = micro_batch_work(model, optimizer, replace(step_settings, clip=1.0, shards=shards))
    protection = Protection(work=work)
    for step in range(3):
        pieces = split(split_by_rank(BATCH, ranks.size)[ranks.rank], packed=True, micro_rows=2)
        peers = ALONE if shards is None else ShardedModel(shards, ranks, BATCH.loss_weight)
        safe_step(protection, pieces, step=step, peers=peers)
    held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    share = sum(local(tensor).numel() for tensor in held) / sum(tensor.numel() for tensor in held)
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in model.parameters()
    ], share


def be_rank(place: Path) -> int:
    """Every case in turn; the outcomes go to a file."""
    with joined() as ranks:
        outcomes: dict[str, Any] = {name: one_step(case, ranks) for name, case in CASES.items()}
        outcomes["evaluation"] = evaluated(ranks)
        outcomes["overflow"] = overflown(ranks)
        outcomes["weights"] = updated(ranks)
        outcomes["no memory"] = sentence(ranks, "forward of layer 1", None)
        outcomes["another error"] = sentence(
            ranks, "backward of layer 0", lambda: ValueError("a shape is wrong")
        )
        (place / f"{ranks.rank}.pickle").write_bytes(pickle.dumps(outcomes))
    return 0


def overflown(ranks: Ranks) -> tuple[bool, float, bool]:
    """(updated, scale, whether a weight has changed), where an element of rank 1's shard overflows."""
    protection, _, shards = protect(CASES["float16, scaled"], ranks)
    model, scaler = protection.work.model, protection.work.scaler
    assert shards is not None
    assert scaler is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    protection.work = replace(protection.work, optimizer=optimizer)
    before = [local(parameter).clone() for parameter in model.parameters()]
    real, gradient = shards.ready, next(model.parameters())

    def ready() -> None:
        if ranks.rank == 1 and gradient.grad is not None:
            local(gradient.grad)[0, 0] = torch.inf
        real()

    shards.ready = ready  # type: ignore[method-assign]
    peers = ShardedModel(shards, ranks, BATCH.loss_weight)
    result = safe_step(protection, parts_of(Case())[ranks.rank], step=1, peers=peers)
    same = all(
        torch.equal(local(p), old) for p, old in zip(model.parameters(), before, strict=True)
    )
    return result.step.updated, scaler.get_scale(), same


def parts_of(case: Case) -> list[list[MicroBatch]]:
    parts = zip(split_by_rank(case.batch, 2), case.rows, strict=True)
    return [split(part, packed=case.packed, micro_rows=rows) for part, rows in parts]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    place = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        assert run_ranks(be_rank, place) == [0, 0], (place / "0.err").read_text() + (
            place / "1.err"
        ).read_text()
    return [pickle.loads((place / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_one_process(name: str, outcomes: list[dict[str, Any]]) -> None:
    case, tolerance = CASES[name], 2e-2 if CASES[name].scaled else TOLERANCE[CASES[name].dtype]
    rows = {row.row_id: row for row in case.batch.rows}
    plan = [row_ids for part in plan_parts(outcomes[0][name].result.plan) for row_ids in part]
    assert sorted(row for row_ids in plan for row in row_ids) == sorted(rows)
    expected = alone(
        case, [lay_out([rows[row] for row in row_ids], packed=case.packed) for row_ids in plan]
    )
    for each in (rank[name] for rank in outcomes):
        assert each.streams_stay
        assert each.is_sharded_again
        assert distance(each.gradient, expected.gradient) < tolerance
        assert each.result.step.loss == pytest.approx(expected.result.step.loss, rel=tolerance)
        assert each.result.step.grad_norm == pytest.approx(
            expected.result.step.grad_norm, rel=tolerance
        )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fault])
def test_what_fails_in_one_process_is_told_to_all_with_its_rank(
    name: str, outcomes: list[dict[str, Any]]
) -> None:
    told = [[str(failure) for failure in rank[name].result.failures] for rank in outcomes]
    assert told[0] == told[1]
    fault = CASES[name].fault
    assert fault is not None
    assert len(told[0]) == len(fault[1])
    assert all(sentence.startswith("rank 1: out of memory in the ") for sentence in told[0])


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if case.dtype == torch.float32 and not case.scaled],
)
def test_the_noise_is_measured_over_the_micro_batches_of_all_ranks(
    name: str, outcomes: list[dict[str, Any]]
) -> None:
    case, norms = CASES[name], outcomes[1][name].norms
    rows = {row.row_id: row for row in case.batch.rows}
    plan = [row_ids for part in plan_parts(outcomes[0][name].result.plan) for row_ids in part]
    expected = alone(
        case, [lay_out([rows[row] for row in row_ids], packed=case.packed) for row_ids in plan]
    ).norms
    assert norms is not None
    assert expected is not None
    assert norms.micro == pytest.approx(expected.micro, rel=1e-5)
    assert norms.total == pytest.approx(expected.total, rel=1e-5)
    assert norms.weights == expected.weights


def test_an_evaluation_that_fails_in_one_process_is_that_of_all_rows(
    outcomes: list[dict[str, Any]],
) -> None:
    protection, _, _ = protect(CASES["unequal rows"])
    model = protection.work.model
    for rank in range(2):
        found, is_sharded = outcomes[rank]["evaluation"]
        assert is_sharded
        expected = safe_evaluate(
            model,
            parts_of(Case(rows=(1, 7)))[rank],
            settings=settings_for(model, "chunked"),
            query_free_bytes=lambda: None,
        ).result
        assert found.result.row_ids == expected.row_ids
        assert found.result.row_losses == pytest.approx(expected.row_losses, rel=1e-5)
        assert len(found.failures) == len(EVAL_FAULT)


def test_an_overflow_in_one_shard_is_one_in_all(outcomes: list[dict[str, Any]]) -> None:
    assert [rank["overflow"] for rank in outcomes] == [(False, 2.0**7, True)] * 2


def test_the_updated_weights_are_those_of_one_process(outcomes: list[dict[str, Any]]) -> None:
    for mine, expected in zip(outcomes[0]["weights"][0], updated(Ranks())[0], strict=True):
        assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-6)


def test_each_process_holds_its_share_of_weights_and_state(outcomes: list[dict[str, Any]]) -> None:
    """Rows that cannot be halved go to the first."""
    shares = [rank["weights"][1] for rank in outcomes]
    assert sum(shares) == pytest.approx(1, abs=2e-3)  # each has the counters of Adam's steps
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)


def test_what_ends_one_process_ends_all_with_its_sentence(outcomes: list[dict[str, Any]]) -> None:
    first, second = (rank["no memory"] for rank in outcomes)
    assert first == second
    assert first.startswith(
        f"{OutOfMemoryError.__name__}: no memory for 20.0 MiB in the forward of sample"
    )
    assert outcomes[1]["another error"] == "ValueError: a shape is wrong"
    assert (
        outcomes[0]["another error"]
        == f"{FituneError.__name__}: rank 1: ValueError: a shape is wrong"
    )
