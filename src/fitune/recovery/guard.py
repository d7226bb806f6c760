"""What stands between the loop of a run and its device's memory: steps and evaluations that survive running out of it,
and the size of micro-batches as memory comes and goes.

    start     optimizer state made, the model checked on two rows, the heaviest micro-batch tried: before step 1
    train     one safe step, in micro-batches of the size that fits now; what it showed is learned
    settle    the card as it is predicted: with no more than the weights and the optimizer's state
    evaluate  with a ladder of its own
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fitune.allocator.prediction import Prediction
from fitune.batch_size.norms import GradientNorms, NormRecorder
from fitune.config import RunConfig
from fitune.data.deal import deal
from fitune.data.examples import Examples
from fitune.data.packing import lay_out
from fitune.data.rows import Batch, MicroBatch, Row
from fitune.distributed.processes import Ranks
from fitune.errors import FituneError
from fitune.machine.out_of_memory import release_memory, release_workspaces, try_twice
from fitune.machine.process_memory import held_bytes
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.recovery.evaluate import safe_evaluate
from fitune.recovery.failure import Failure
from fitune.recovery.fallbacks import allowed_fallbacks
from fitune.recovery.observed import observed, room_bytes, survivable
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import RUNG, MemoryModel, choose_size, memory_model
from fitune.recovery.step import SafeResult, read_norms, safe_step, try_pieces
from fitune.step.assemble import Setup
from fitune.step.evaluate import EvalResult, merge_evaluations
from fitune.step.optimizer_state import create_state
from fitune.step.peers import ALONE, Alone, ShardedModel, SharedSamples
from fitune.step.work import loss_share, micro_batch_work
from fitune.units import format_bytes, parse_bytes

LARGEST_POSITIONS = 65536
"""Of a micro-batch; beyond that no card gets faster."""
PROBE_ROWS = ((3, 1), (12, 10))
"""(tokens, targets) of the two rows that the model is checked with."""


class Guard:
    """tell(kind, sentence): told of every event. ranks: the processes that the rows of a step are dealt over.
    free_bytes: before the last step; None before the first."""

    def __init__(
        self,
        config: RunConfig,
        setup: Setup,
        *,
        examples: Examples,
        tell: Callable[[str, str], None],
        predicted: Prediction | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._setup, self._tell, self._ranks = setup, tell, ranks or Ranks()
        self._shards = setup.settings.shards
        work = micro_batch_work(setup.model, setup.optimizer, setup.settings, scaler=setup.scaler)
        self.protection = Protection(
            work=work,
            seed=config.train.seed,
            fallbacks=allowed_fallbacks(
                setup.model, setup.settings, recompute=config.model.recompute, loss=config.loss
            ),
            quarantine=config.memory.on_oom == "quarantine",
            room=self._free_bytes,
            way_out=_way_out(config),
        )
        self._device = self.protection.device
        budget = config.memory.budget
        self._budget_bytes = (
            parse_bytes(budget) if isinstance(budget, str) and budget != "auto" else None
        )
        self._heaviest = _heaviest(
            examples, setup, rows_per_step=config.batch.rows_per_step, num_ranks=self._ranks.size
        )
        planned = setup.layout.micro_tokens or self._heaviest[0].num_positions
        is_open = config.batch.micro_rows is None and config.batch.micro_tokens == "auto"
        may_grow = config.memory.grow and is_open and self._device.type == "cuda"
        self.memory = MemoryModel(
            planned=planned,
            highest=max(0, math.floor(math.log(LARGEST_POSITIONS / planned, RUNG)))
            if may_grow
            else 0,
            prior_slope=_predicted_slope(predicted, planned),
        )
        self._eval_most_positions: int | None = None
        self._told_rung = 0
        self.free_bytes: int | None = None

    @property
    def is_as_planned(self) -> bool:
        """Whether micro-batches have the size that was predicted."""
        return self.memory.rung == 0

    def start(self) -> None:
        """Raises OutOfMemoryError where not even the optimizer's state, or a single row, fits."""
        if self._shards is None:
            self._ranks.connect(self._device)
        optimizer = self.protection.work.optimizer
        with survivable(self._device):
            complete = try_twice(
                lambda: create_state(optimizer), device=self._device, what="the optimizer's state"
            )
            if self._shards is None:
                verdict = try_twice(
                    self._check_model,
                    device=self._device,
                    what="the check of the model on two samples",
                )
            else:
                self._ranks.exchange(None)  # all have their state
                with self._shards.together():
                    verdict = self._check_model()
        if not complete and not self.protection.work.commit:
            self._tell(
                "unprotected",
                "the optimizer makes its state in its first update, which cannot be undone",
            )
        if verdict.reason:
            kind = "model_check" if verdict.exact else "not_exact"
            self._tell(
                kind,
                verdict.reason
                if verdict.exact
                else f"warning: not exact in parts: {verdict.reason}",
            )
        with self._telling():  # of a sharded model in every process at once
            peers = ALONE if self._shards is None else ShardedModel(self._shards)
            self._observed(
                lambda: try_pieces(self.protection, self._heaviest, peers=peers), self._free_bytes()
            )
        if self._device.type == "cpu":
            release_memory(
                self._device
            )  # the C library would keep what the longest rows took; most batches need less

    def settle(self) -> None:
        """A card's reserved memory depends on all that was done before. What was tried out is given back, so that the
        first step begins as it was predicted; the next steps allocate it again, in milliseconds."""
        if self._device.type == "cuda":
            release_workspaces(self._device)

    def train(
        self,
        batch: Batch,
        micro_batches: list[MicroBatch],
        *,
        step: int,
        keep_plan: bool = False,
        norms: NormRecorder | None = None,
    ) -> SafeResult:
        """micro_batches: this process's part of the batch as it was laid out ahead, taken where it is still of the
        right size. keep_plan: take it in any case, as a replay does. norms: reads the step's gradients. Raises what
        `safe_step` raises."""
        self.free_bytes = self._free_bytes()
        part = deal(batch, self._ranks.size)[self._ranks.rank]
        if not keep_plan:
            size = choose_size(self.memory, self.free_bytes)
            if self._shards is not None:
                size = min(
                    self._ranks.exchange(size)
                )  # passes are common, so one larger than the others gains nothing
            self._tell_size(self.free_bytes)
            if size != self.memory.planned:
                micro_batches = replace(
                    self._setup.layout, micro_rows=None, micro_tokens=size
                ).split(part)
        peers = self._peers(batch)
        with self._telling():
            return self._observed(
                lambda: safe_step(
                    self.protection,
                    micro_batches,
                    step=step,
                    fits=self._fits,
                    norms=norms,
                    peers=peers,
                ),
                self.free_bytes,
                part.num_tokens,
            )

    def read_norms(
        self, micro_batches: list[MicroBatch], norms: NormRecorder
    ) -> GradientNorms | None:
        """Of the gradient that these micro-batches have together, without a step. None where they have no target."""
        return self._observed(
            lambda: read_norms(self.protection, micro_batches, norms, fits=self._fits),
            self._free_bytes(),
        ).step.norms

    def set_clip(self, clip: float) -> None:
        self.protection.work = replace(self.protection.work, clip=clip)

    def apply_fallbacks(self, names: Iterable[str]) -> None:
        """Save memory from now on in these ways, as a run did that is resumed or replayed."""
        for name in names:
            self.protection.apply(name)

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> EvalResult:
        """micro_batches: this process's part. Of all parts."""
        with self._telling(), survivable(self._device):
            found = safe_evaluate(
                self.protection.work.model,
                micro_batches,
                settings=self._setup.settings,
                room=self._free_bytes,
                most_positions=self._eval_most_positions,
                quarantine=self.protection.quarantine,
                shards=self._shards,
            )
        self._eval_most_positions = found.most_positions
        self._tell_failures(found.failures)
        return merge_evaluations(self._ranks.exchange(found.result))

    def to_json(self) -> dict[str, Any]:
        """What it has learned, for a checkpoint; what each has, where there are several processes."""
        own = {
            "memory": asdict(self.memory),
            "quarantined": sorted(self.protection.quarantined),
            "eval_most_positions": self._eval_most_positions,
            "reliefs": self.protection.applied,
        }
        every = self._ranks.exchange(own)
        return own if len(every) == 1 else {"ranks": every}

    def restore(self, content: Mapping[str, Any]) -> None:
        """What `to_json` gave. Under another plan the sizes that were learned mean nothing and are not taken."""
        every = content.get("ranks", [content])
        content = every[self._ranks.rank if self._ranks.rank < len(every) else 0]
        if content["memory"]["planned"] == self.memory.planned:
            self.memory = memory_model(content["memory"])
            self._told_rung = self.memory.rung
        self.protection.quarantined = set(content["quarantined"])
        self.apply_fallbacks(content["reliefs"])
        self._eval_most_positions = content["eval_most_positions"]

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What ends this process's part ends the others', who wait for it."""
        try:
            yield
        except FituneError as error:
            self._ranks.tell(error)
            raise

    def _peers(self, batch: Batch) -> Alone:
        if self._ranks.size == 1:
            return ALONE if self._shards is None else ShardedModel(self._shards)
        if self._shards is None:
            return SharedSamples(self._ranks, self._loss_weight(batch))
        return ShardedModel(self._shards, self._ranks, self._loss_weight(batch))

    def _loss_weight(self, batch: Batch) -> float:
        """N of the batch, without the rows that are left out; the same in all processes."""
        left_out = self.protection.quarantined
        return Batch(tuple(row for row in batch.rows if row.row_id not in left_out)).loss_weight

    def _observed(
        self,
        action: Callable[[], SafeResult],
        free_bytes: int | None,
        num_tokens: int | None = None,
    ) -> SafeResult:
        result = observed(
            self.memory, action, device=self._device, free_bytes=free_bytes, num_tokens=num_tokens
        )
        self._tell_failures(result.failures)
        return result

    def _tell_failures(self, failures: Iterable[Failure]) -> None:
        for failure in failures if self._shards is None or self._ranks.leads else ():
            self._tell("out_of_memory", str(failure))

    def _tell_size(self, free_bytes: int | None) -> None:
        before, now = self._told_rung, self.memory.rung
        if now != before:
            self._told_rung = now
            size = self.memory.size(now)
            self._tell(
                "micro_batch",
                f"micro-batches {'shrink' if now < before else 'grow'} to at most {size:,} tokens with padding, "
                f"with {format_bytes(free_bytes)} free; the effective batch stays",
            )

    def _fits(self, num_positions: int) -> bool:
        return self.memory.fits(num_positions, self._free_bytes())

    def _free_bytes(self) -> int | None:
        bounds = [room_bytes(self._device)]
        if self._budget_bytes is not None:
            bounds.append(max(self._budget_bytes - held_bytes(self._device), 0))
        return min((each for each in bounds if each is not None), default=None)

    def _check_model(self) -> Verdict:
        settings, layout = self._setup.settings, self._setup.layout
        rows = [_probe_row(number, *size) for number, size in enumerate(PROBE_ROWS)]
        masked = Row(0, rows[0].input_ids, np.zeros_like(rows[0].loss_weights))
        both = lay_out(rows, packed=layout.packed)
        first, second, empty = (lay_out([row], packed=layout.packed) for row in (*rows, masked))
        return check_model(
            self.protection.work.model,
            lambda part, weight: loss_share(
                self.protection.work.model, part, loss_weight=weight, settings=settings
            ),
            ProbeSamples(both, first, second, empty, both.loss_weight),
            shards=self._shards,
        )


def _way_out(config: RunConfig) -> str:
    """What would make room for a row that does not fit alone."""
    ways = [f"lower data.max_length (now {config.data.max_length:,})"]
    if config.model.recompute not in ("auto", "full"):
        ways.append("allow model.recompute=auto")
    if config.loss == "full":
        ways.append("allow loss=auto")
    if config.model.method == "full":
        ways.append("set model.method=lora")
    ways.append("leave such samples out with memory.on_oom=quarantine")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def _probe_row(row_id: int, num_tokens: int, num_targets: int) -> Row:
    weights = np.zeros(num_tokens, np.float32)
    weights[num_tokens - num_targets :] = 1
    return Row(row_id, np.arange(1, num_tokens + 1, dtype=np.int32), weights)


def _heaviest(
    examples: Examples, setup: Setup, *, rows_per_step: int, num_ranks: int
) -> list[MicroBatch]:
    """The largest micro-batch that the longest rows make, twice where a step has two: the second finds the gradients
    there already."""
    longest = np.argsort(-examples.lengths, kind="stable")[:rows_per_step]
    part = deal(Batch(tuple(examples[int(row)] for row in longest)), num_ranks)[0]
    micro_batches = setup.layout.split(part)
    largest = max(micro_batches, key=lambda micro_batch: micro_batch.num_positions)
    return [largest] * min(len(micro_batches), 2)


def _predicted_slope(predicted: Prediction | None, planned: int) -> float:
    """Bytes of activations and temporaries per position, at the predicted peak; 0 where there is none."""
    if predicted is None:
        return 0.0
    return (
        predicted.categories.get("activation", 0) + predicted.categories.get("temporary", 0)
    ) / planned
