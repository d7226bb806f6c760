"""Protects a run's steps and evaluations from running out of memory, and sizes its micro-batches.

The training loop calls these methods of `Guard`:

    start                 before step 1: allocate the optimizer's state, check the model on two
                          samples, and try the heaviest micro-batch
    release_trial_memory  on a GPU: give back what was tried, so that the first step begins as
                          predicted
    train                 do one safe step, in micro-batches of a size that fits now, and learn
                          from it
    evaluate              evaluate, in micro-batches of a size that is learned separately
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
from fitune.data.examples import Examples
from fitune.data.packing import lay_out
from fitune.data.rows import Batch, MicroBatch
from fitune.data.split_by_rank import split_by_rank
from fitune.distributed.processes import Ranks
from fitune.errors import FituneError
from fitune.machine.out_of_memory import release_memory, release_workspaces, try_twice
from fitune.machine.process_memory import held_bytes
from fitune.recovery.divisibility import ProbeSamples, Verdict, check_model
from fitune.recovery.evaluate import safe_evaluate
from fitune.recovery.failure import Failure
from fitune.recovery.fallbacks import allowed_fallbacks
from fitune.recovery.observed import allocatable_bytes, observed, survivable
from fitune.recovery.protection import Protection
from fitune.recovery.size_control import LEVEL_RATIO, MemoryModel, choose_size, memory_model
from fitune.recovery.step import SafeResult, read_norms, safe_step, try_pieces
from fitune.step.assemble import Setup
from fitune.step.evaluate import EvalResult, merge_evaluations
from fitune.step.gradients import loss_of
from fitune.step.optimizer_state import create_state
from fitune.step.peers import ALONE, Alone, ShardedModel, SharedSamples
from fitune.step.work import loss_share, micro_batch_work
from fitune.units import format_bytes, parse_bytes

#: The largest micro-batch, in padded tokens; beyond it no GPU gets faster.
LARGEST_POSITIONS = 65536
#: (tokens, targets) of the two samples that the model is checked with
PROBE_ROWS = ((3, 1), (12, 10))


class Guard:
    """Does a run's steps and evaluations so that running out of memory does not end them.

    report: is called with the kind and the message of every event.
    ranks: the processes that the samples of a step are sharded over.
    """

    def __init__(
        self,
        config: RunConfig,
        setup: Setup,
        *,
        examples: Examples,
        report: Callable[[str, str], None],
        predicted: Prediction | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._setup, self._report, self._ranks = setup, report, ranks or Ranks()
        self._shards = setup.settings.shards
        work = micro_batch_work(setup.model, setup.optimizer, setup.settings, scaler=setup.scaler)
        self.protection = Protection(
            work=work,
            seed=config.train.seed,
            fallbacks=allowed_fallbacks(
                setup.model, setup.settings, recompute=config.model.recompute, loss=config.loss
            ),
            quarantine=config.memory.on_oom == "quarantine",
            query_free_bytes=self._free_bytes,
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
        may_grow = config.memory.grow and config.batch.is_micro_open and self._device.type == "cuda"
        self.memory = MemoryModel(
            planned=planned,
            highest=max(0, math.floor(math.log(LARGEST_POSITIONS / planned, LEVEL_RATIO)))
            if may_grow
            else 0,
            prior_slope=_predicted_slope(predicted, planned),
        )
        self._eval_most_positions: int | None = None
        self._reported_level = 0
        #: before the last step; None before the first
        self.free_bytes: int | None = None

    @property
    def is_as_planned(self) -> bool:
        """Whether micro-batches have the size that was predicted."""
        return self.memory.level == 0

    def start(self) -> None:
        """Prepare the first step, and report what the check of the model found.

        Raises OutOfMemoryError if the optimizer's state or a single sample does not fit.
        """
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
                self._ranks.exchange(None)  # wait until all have allocated their state
                with self._shards.together():
                    verdict = self._check_model()
        if not complete and not self.protection.work.commit:
            self._report(
                "unprotected",
                "the optimizer makes its state in its first update, which cannot be undone",
            )
        if verdict.reason:
            kind = "model_check" if verdict.exact else "not_exact"
            self._report(
                kind,
                verdict.reason
                if verdict.exact
                else f"warning: not exact in parts: {verdict.reason}",
            )
        with self._errors_shared():
            peers = ALONE if self._shards is None else ShardedModel(self._shards)
            self._observed(
                lambda: try_pieces(self.protection, self._heaviest, peers=peers), self._free_bytes()
            )
        if self._device.type == "cpu":
            # The C library would keep what the longest samples took; most batches need less.
            release_memory(self._device)

    def release_trial_memory(self) -> None:
        """Give back the memory of everything tried, so that the first step begins as predicted.

        On a GPU the reserved memory depends on everything that was allocated before. The next steps
        allocate it again within milliseconds.
        """
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
        """Do one optimizer step on a batch, in micro-batches of a size that fits now.

        micro_batches: this process's samples as they were split ahead of time; split again if their
            size does not fit any more.
        keep_plan: use `micro_batches` as they are in any case, as a replay does.
        norms: reads the step's gradients.

        Raises what `safe_step` raises.
        """
        self.free_bytes = self._free_bytes()
        part = split_by_rank(batch, self._ranks.size)[self._ranks.rank]
        if not keep_plan:
            size = choose_size(self.memory, self.free_bytes)
            if self._shards is not None:
                # The processes compute each pass together, so a larger size in one gains nothing.
                size = min(self._ranks.exchange(size))
            self._report_size(self.free_bytes)
            if size != self.memory.planned:
                layout = replace(self._setup.layout, micro_rows=None, micro_tokens=size)
                micro_batches = layout.split(part)
        peers = self._peers(batch)
        with self._errors_shared():
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
        """Compute the gradient of these micro-batches together, and return its norms.

        Nothing is updated. Returns None if the micro-batches have no target.
        """
        return self._observed(
            lambda: read_norms(self.protection, micro_batches, norms, fits=self._fits),
            self._free_bytes(),
        ).step.norms

    def set_clip(self, clip: float) -> None:
        self.protection.work = replace(self.protection.work, clip=clip)

    def apply_fallbacks(self, names: Iterable[str]) -> None:
        """Apply these fallbacks from now on, as the run did that is resumed or replayed."""
        for name in names:
            self.protection.apply(name)

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> EvalResult:
        """Evaluate this process's micro-batches, and return the result over all processes."""
        with self._errors_shared(), survivable(self._device):
            found = safe_evaluate(
                self.protection.work.model,
                micro_batches,
                settings=self._setup.settings,
                query_free_bytes=self._free_bytes,
                most_positions=self._eval_most_positions,
                quarantine=self.protection.quarantine,
                shards=self._shards,
            )
        self._eval_most_positions = found.most_positions
        self._report_failures(found.failures)
        return merge_evaluations(self._ranks.exchange(found.result))

    def to_json(self) -> dict[str, Any]:
        """Return what was learned, for a checkpoint: of every process if there are several."""
        own = {
            "memory": asdict(self.memory),
            "quarantined": sorted(self.protection.quarantined),
            "eval_most_positions": self._eval_most_positions,
            "reliefs": self.protection.applied,
        }
        every = self._ranks.exchange(own)
        return own if len(every) == 1 else {"ranks": every}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Restore what `to_json` returned.

        Learned sizes are meaningless under another plan, and are then ignored.
        """
        every = content.get("ranks", [content])
        content = every[self._ranks.rank if self._ranks.rank < len(every) else 0]
        if content["memory"]["planned"] == self.memory.planned:
            self.memory = memory_model(content["memory"])
            self._reported_level = self.memory.level
        self.protection.quarantined = set(content["quarantined"])
        self.apply_fallbacks(content["reliefs"])
        self._eval_most_positions = content["eval_most_positions"]

    @contextmanager
    def _errors_shared(self) -> Iterator[None]:
        """Send an error that ends this process's step to the other processes, which wait for it."""
        try:
            yield
        except FituneError as error:
            self._ranks.send_error(error)
            raise

    def _peers(self, batch: Batch) -> Alone:
        if self._ranks.size == 1:
            return ALONE if self._shards is None else ShardedModel(self._shards)
        if self._shards is None:
            return SharedSamples(self._ranks, self._loss_weight(batch))
        return ShardedModel(self._shards, self._ranks, self._loss_weight(batch))

    def _loss_weight(self, batch: Batch) -> float:
        """Return N of the batch without quarantined samples; it is the same in all processes."""
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
        self._report_failures(result.failures)
        return result

    def _report_failures(self, failures: Iterable[Failure]) -> None:
        for failure in failures if self._shards is None or self._ranks.leads else ():
            self._report("out_of_memory", str(failure))

    def _report_size(self, free_bytes: int | None) -> None:
        before, now = self._reported_level, self.memory.level
        if now != before:
            self._reported_level = now
            size = self.memory.size(now)
            self._report(
                "micro_batch",
                f"micro-batches {'shrink' if now < before else 'grow'} to at most {size:,} tokens with padding, "
                f"with {format_bytes(free_bytes)} free; the effective batch stays",
            )

    def _fits(self, num_positions: int) -> bool:
        return self.memory.fits(num_positions, self._free_bytes())

    def _free_bytes(self) -> int | None:
        bounds = [allocatable_bytes(self._device)]
        if self._budget_bytes is not None:
            bounds.append(max(self._budget_bytes - held_bytes(self._device), 0))
        return min((each for each in bounds if each is not None), default=None)

    def _check_model(self) -> Verdict:
        settings, layout = self._setup.settings, self._setup.layout
        rows = [
            settings.objective.made_up_row(row_id, np.arange(1, num_tokens + 1), num_targets)
            for row_id, (num_tokens, num_targets) in enumerate(PROBE_ROWS)
        ]
        masked = settings.objective.made_up_row(0, rows[0].input_ids, 0)
        both = lay_out(rows, packed=layout.packed)
        first, second, empty = (lay_out([row], packed=layout.packed) for row in (*rows, masked))
        return check_model(
            self.protection.work.model,
            lambda part, weight: loss_of(
                loss_share(self.protection.work.model, part, loss_weight=weight, settings=settings)
            ),
            ProbeSamples(both, first, second, empty, both.loss_weight),
            shards=self._shards,
        )


def _way_out(config: RunConfig) -> str:
    """Return what the user can do about a sample that does not fit alone."""
    ways = [f"lower data.max_length (now {config.data.max_length:,})"]
    if config.model.recompute not in ("auto", "full"):
        ways.append("allow model.recompute=auto")
    if config.loss == "full":
        ways.append("allow loss=auto")
    if config.model.method == "full":
        ways.append("set model.method=lora")
    ways.append("leave such samples out with memory.on_oom=quarantine")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def _heaviest(
    examples: Examples, setup: Setup, *, rows_per_step: int, num_ranks: int
) -> list[MicroBatch]:
    """Return the largest micro-batch of the longest samples, twice if a step has two or more.

    The second one finds the gradients of the first already allocated.
    """
    longest = np.argsort(-examples.lengths, kind="stable")[:rows_per_step]
    part = split_by_rank(Batch(tuple(examples[int(row)] for row in longest)), num_ranks)[0]
    micro_batches = setup.layout.split(part)
    largest = max(micro_batches, key=lambda micro_batch: micro_batch.num_positions)
    return [largest] * min(len(micro_batches), 2)


def _predicted_slope(predicted: Prediction | None, planned: int) -> float:
    """Return the predicted bytes of activations and temporaries per padded token, or 0 if unknown."""
    if predicted is None:
        return 0.0
    return (
        predicted.categories.get("activation", 0) + predicted.categories.get("temporary", 0)
    ) / planned
