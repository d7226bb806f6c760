"""Forecasts the memory and the work of a setting, and caches the forecasts in memory and on disk.

A forecast is a prediction reduced to numbers. Neither torch nor transformers is imported before
something has to be recorded, so a second plan of the same model only reads a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from fitune.allocator.prediction import other_routing
from fitune.config import Loss, OptimConfig, RunConfig
from fitune.errors import ConfigError, ModelError
from fitune.importing import collections_paused
from fitune.machine.libc import allocator_name
from fitune.planning.cache import file_state, read_cached, write_cached
from fitune.planning.choices import Choice, apply_choice, with_routing
from fitune.planning.cost import OpCost, StepShape, StepWork, work_of
from fitune.planning.limits import Lengths, MemoryLimits
from fitune.planning.plan import ADAMW_HOST
from fitune.recorder.events import TRANSFER, Category

if TYPE_CHECKING:
    from fitune.trace.library import Recordings
    from fitune.trace.own_step import Pass, RecordedStep

#: (tokens, supervised tokens) of each sample of a micro-batch
Sizes = tuple[tuple[int, int], ...]
#: the number of steps over which the mean shape of a step is taken
_NUM_SHAPED_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one setting needs on one device."""

    num_parameters: int
    num_trainable_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    precision: str
    packed: bool
    chunked: bool
    #: samples of the longest length in the largest micro-batch
    micro_batch: int
    #: tokens of the largest micro-batch, padding included
    positions: int
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    categories: Mapping[Category, int]
    peak_phase: str
    num_alloc_retries: int
    fits: bool
    #: the limit that the allocations were replayed against; None if it made no difference
    limit_bytes: int | None
    notes: tuple[str, ...]
    #: see `Candidate.predicted_host_bytes`
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.reserved_bytes + self.context_bytes

    def within(self, limit_bytes: int) -> "Forecast | None":
        """Return the forecast for another limit, or None if the allocations must be replayed."""
        if self.limit_bytes is not None:
            return self if self.limit_bytes == limit_bytes else None
        if self.device_bytes > limit_bytes >= self.allocated_bytes + self.context_bytes:
            return None
        return replace(self, fits=self.device_bytes <= limit_bytes)


class Library:
    """The recordings of one process, which several plans may share, and the program's own memory.

    Recordings of one model serve every plan of it, whatever its batch, card or limit.
    """

    def __init__(self) -> None:
        #: the memory of this process before its first recording; of use on a CPU alone
        self.program_bytes = psutil.Process().memory_info().rss
        self._recordings: Recordings | None = None
        self._known: dict[str, dict[str, Any]] = {}

    def known(self, key: object) -> dict[str, Any]:
        """Return the results for this key so far, of this process or from the cache."""
        text = repr(key)
        if text not in self._known:
            self._known[text] = read_cached("plans", key) or {}
        return self._known[text]

    def begin_plan(self) -> None:
        """Give this plan as much time for its recordings as the first one had."""
        if self._recordings is not None:
            self._recordings.renew_patience()

    def load(self) -> "Recordings":
        """Import torch and transformers, measure the program, and return the recordings."""
        if self._recordings is None:
            with collections_paused():
                from fitune.trace.library import Recordings

            self._recordings = Recordings()
            self.program_bytes = psutil.Process().memory_info().rss
        return self._recordings


class Forecaster:
    """Forecasts the settings of one configuration on one device.

    `known` contains all results so far as JSON values; `save` stores them for the next process.
    """

    def __init__(
        self,
        config: RunConfig,
        limits: MemoryLimits,
        lengths: Lengths,
        *,
        num_shards: int = 1,
        library: "Library | None" = None,
    ) -> None:
        self.config, self.limits, self.lengths = config, limits, lengths
        self.num_shards = num_shards
        device = limits.device
        # work is the same whatever the samples of a step are
        self._work_key = [
            config.model_dump(
                mode="json", include={"model", "loss", "objective", "preference", "eval"}
            ),
            config.optim.model_dump(
                mode="json", exclude={"lr", "warmup", "schedule", "final_lr_fraction"}
            ),
            [config.data.packing, config.train.label_smoothing],
            [config.memory.allocator, config.memory.routing],
            [device.name, device.total_bytes, device.compute_capability],
            allocator_name() if device.kind == "cpu" else None,
            asdict(lengths),
            num_shards,
            file_state(config.model.source),
            [field.name for field in fields(Forecast)],
        ]
        self._key = [*self._work_key, config.batch.rows_per_step]
        self._library = library or Library()
        self.known = self._library.known(self._key)
        self._num_read = len(self.known)
        self._is_checked = False

    def forecast(self, choice: Choice) -> Forecast:
        """Return the forecast of a setting, from the cache if it is there.

        Raises what the recording raises; ModelError and ConfigError are cached too.
        """
        limit_bytes = self.limits.limit_bytes
        for key in (f"{choice}", f"{choice} {limit_bytes}"):
            tree = self.known.get(key)
            if tree is not None and "refused" in tree:
                raise ModelError(tree["refused"])
            if tree is not None and (found := self._within(_forecast(tree))) is not None:
                return found
        try:
            found = self._predict(choice)
        except (ModelError, ConfigError) as error:
            self.known[f"{choice}"] = {"refused": str(error)}
            raise
        key = f"{choice}" if found.limit_bytes is None else f"{choice} {limit_bytes}"
        self.known[key] = asdict(found)
        return self._within(found) or found

    def knows(self, choice: Choice) -> bool:
        return f"{choice}" in self.known or f"{choice} {self.limits.limit_bytes}" in self.known

    def learn(self, known: Mapping[str, object]) -> None:
        """Add the results of another process, for the same configuration and device."""
        for key in known.keys() - self.known.keys():
            self.known[key] = known[key]

    def work(self, variant: Choice, *, tokens: int, supervised_fraction: float = 1.0) -> StepWork:
        """Return the work of a step whose micro-batches have `tokens` tokens.

        All samples have the longest length, but for a shorter one that makes up the rest.
        supervised_fraction: the fraction of their tokens that are targets.
        """
        key = _work_key(variant, tokens, supervised_fraction)
        if key not in self.known:
            works = self._library.known(self._work_key)
            if key not in works:
                works[key] = asdict(self._record(variant, tokens, supervised_fraction))
            self.known[key] = works[key]
        return _step_work(self.known[key])

    def shape(self, choice: Choice, *, packed: bool | None = None) -> StepShape:
        """Return the mean shape of a few steps of samples drawn from the lengths of the data.

        They are split into micro-batches as the run will split them.
        packed: whether samples are packed, if that is known; else it is found by recording.
        """
        if packed is None:
            packed = self.work(self._simplest(choice), tokens=self.lengths.longest_tokens).packed
        key = f"shape {packed} {choice.micro_rows} {choice.micro_tokens}"
        if key not in self.known:
            self.known[key] = asdict(self._shape(choice, packed=packed))
        return StepShape(**self.known[key])

    def _simplest(self, choice: Choice) -> Choice:
        """Return a variant of the same model that is recorded in any case.

        Whether samples are packed depends on the model alone, so this variant tells it.
        """
        recompute = "off" if self.config.model.recompute == "auto" else self.config.model.recompute
        loss: Loss = "chunked" if self.config.loss == "auto" else self.config.loss
        simple = replace(
            choice.variant, recompute=recompute, loss=loss, offloads=False, optimizer=None
        )
        is_same = (simple.method, simple.precision) == (None, None)
        return replace(simple, result="same" if is_same else choice.result)

    def other_routing_bytes(self, choice: Choice) -> int:
        """Return the allocated bytes at the peak with the other routing of tokens to experts."""
        key = f"other routing {choice}"
        if key not in self.known:
            config = with_routing(self.config, other_routing(self.config.memory.routing))
            # recordings are shared, since their time has one limit together
            other = Forecaster(
                config,
                self.limits,
                self.lengths,
                num_shards=self.num_shards,
                library=self._library,
            )
            self.known[key] = other.forecast(choice).allocated_bytes
        return int(self.known[key])

    def save(self) -> None:
        if len(self.known) > self._num_read:
            write_cached("plans", self._key, self.known)

    def _within(self, forecast: Forecast) -> Forecast | None:
        """Return the forecast for this forecaster's limits, or None if it must be replayed.

        On a CPU nothing is replayed, but the program occupies a part of the same memory: what a
        process holds after it has loaded all that it needs.
        """
        limit_bytes = self.limits.limit_bytes
        if self.limits.device.kind != "cpu":
            found = forecast.within(limit_bytes)
            host_bytes = self.limits.host_bytes
            if found is None or host_bytes is None or found.host_bytes <= host_bytes:
                return found
            return replace(found, fits=False)
        program_bytes = max(self.known.get("program_bytes", 0), self._library.program_bytes)
        fits = forecast.reserved_bytes + program_bytes <= limit_bytes
        return replace(forecast, context_bytes=program_bytes, fits=fits)

    def load(self) -> "Recordings":
        """Import torch and transformers, and return the recordings of this process."""
        recordings = self._library.load()
        if not self._is_checked:
            from fitune.model.load import check_length

            check_length(self.config.model, self.config.data.max_length)
            self._is_checked = True
            if self._num_read == 0:
                self.known["program_bytes"] = self._library.program_bytes
        return recordings

    def _predict(self, choice: Choice) -> Forecast:
        recordings = self.load()
        from fitune.model.load import load_config
        from fitune.planning.predict import predict_run

        config = apply_choice(self.config, choice)
        rows = heaviest_rows(
            choice,
            self.lengths,
            most_rows=config.batch.rows_per_step,
            packing=config.data.packing,
        )
        eval_tokens = self.lengths.longest_eval_tokens
        passes = _passes(config.optim, rows, eval_tokens, config.batch.rows_per_step)
        prediction = predict_run(
            config,
            self.limits.device,
            passes=passes,
            limit_bytes=self.limits.limit_bytes,
            recordings=recordings,
            find_oom=False,
            num_shards=self.num_shards,
        )
        recorded, largest = prediction.recorded, prediction.largest
        # this recording gives the work of a step too if it has two such micro-batches
        if choice.micro_tokens is not None and len(passes[-1].rows) == 2 * len(rows):
            key = _work_key(choice.variant, choice.micro_tokens, 1.0)
            works = self._library.known(self._work_key)
            works[key] = self.known[key] = asdict(
                work_of(recorded.work, rows=rows, packed=recorded.layout.packed)
            )
        limit_bytes = self.limits.limit_bytes
        unlimited = self.limits.device.kind == "cpu" or (
            largest.peak_reserved_bytes + prediction.context_bytes <= limit_bytes
            and not largest.num_alloc_retries
        )
        cannot = largest.peak_allocated_bytes + prediction.context_bytes > limit_bytes
        text = load_config(config.model).get_text_config()
        return Forecast(
            num_parameters=recorded.num_parameters,
            num_trainable_parameters=recorded.num_trainable_parameters,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            precision=recorded.precision.name,
            packed=recorded.layout.packed,
            chunked=recorded.chunked,
            micro_batch=max(1, sum(length for length, _ in rows) // self.lengths.longest_tokens),
            positions=sum(length for length, _ in rows),
            allocated_bytes=largest.peak_allocated_bytes,
            reserved_bytes=largest.peak_reserved_bytes,
            context_bytes=prediction.context_bytes,
            categories=dict(largest.categories),
            peak_phase=prediction.peak_phase,
            num_alloc_retries=largest.num_alloc_retries if largest.fits else 0,
            fits=bool(largest.fits),
            limit_bytes=None if unlimited or cannot else limit_bytes,
            notes=(*largest.assumptions, *recorded.notes),
            host_bytes=_host_bytes(
                recorded,
                offloads=config.model.offload_activations,
                on_host=config.optim.name == ADAMW_HOST,
            ),
        )

    def _record(self, variant: Choice, tokens: int, supervised_fraction: float) -> StepWork:
        self.load()
        choice = replace(variant, micro_tokens=tokens)
        config = apply_choice(self.config, choice)
        whole, rest = divmod(tokens, self.lengths.longest_tokens)
        lengths = [self.lengths.longest_tokens] * whole + [rest] * (rest > 1)
        rows = tuple(
            (length, max(1, int(supervised_fraction * (length - 1)))) for length in lengths
        )
        passes = _passes(config.optim, rows, self.lengths.longest_eval_tokens, 2 * len(rows))
        recorded = self._recorded(choice, passes)
        return work_of(recorded.work, rows=rows, packed=recorded.layout.packed)

    def reference_work(self, variant: Choice) -> StepWork:
        """Return the work of computing the reference of one sample, the longest, to keep it."""
        key = f"reference {variant}"
        if key not in self.known:
            self.known[key] = asdict(self._record_reference(variant))
        return _step_work(self.known[key])

    def _record_reference(self, variant: Choice) -> StepWork:
        longest = self.lengths.longest_tokens
        self.load()
        (*_, step) = _passes(self.config.optim, ((longest, longest - 1),), 0, 1)
        choice = replace(variant, micro_tokens=longest)
        recorded = self._recorded(choice, [replace(step, kind="reference")])
        rows = ((longest, longest - 1),)
        return work_of(recorded.work, rows=rows, packed=recorded.layout.packed)

    def _recorded(self, choice: Choice, passes: Sequence["Pass"]) -> "RecordedStep":
        recordings, config = self.load(), apply_choice(self.config, choice)
        from fitune.planning.predict import cuda_target

        target = cuda_target(config.model, self.limits.device)
        step: RecordedStep = recordings.step(config, passes, target=target)
        return step

    def _shape(self, choice: Choice, *, packed: bool) -> StepShape:
        from fitune.data.rows import Batch, Row
        from fitune.step.assemble import Layout

        layout = Layout(packed, choice.micro_rows, choice.micro_tokens)
        sample, rows_per_step = self.lengths.sample_tokens, self.config.batch.rows_per_step
        num_steps = 1 if len(set(sample)) == 1 else _NUM_SHAPED_STEPS
        drawn = np.random.default_rng(0).choice(sample, size=(num_steps, rows_per_step))
        micro_batches = []
        for lengths in drawn:
            rows = (
                Row(i, np.zeros(n, np.int32), np.zeros(n, np.float32))
                for i, n in enumerate(lengths)
            )
            micro_batches += layout.split(Batch(tuple(rows)))
        tokens = int(drawn.sum())
        positions = sum(micro_batch.input_ids_BS.numel() for micro_batch in micro_batches)
        return StepShape(
            num_micro_batches=len(micro_batches) / num_steps,
            positions=positions / num_steps,
            supervised=tokens * self.lengths.supervised_fraction / num_steps,
            row_tokens=float((drawn.astype(float) ** 2).sum() / tokens),
        )


def heaviest_rows(choice: Choice, lengths: Lengths, *, most_rows: int, packing: bool) -> Sizes:
    """Return (tokens, supervised tokens) of each sample of the heaviest possible micro-batch.

    most_rows: the samples of an effective batch.
    """
    longest, most = lengths.longest_tokens, most_rows
    if choice.micro_rows is not None:
        sizes = [longest] * choice.micro_rows
    else:
        assert choice.micro_tokens is not None
        tokens = min(max(choice.micro_tokens, longest), most * longest)
        whole, rest = divmod(tokens, longest)
        if packing:
            sizes = [longest] * whole + ([rest] if rest > 1 and whole < most else [])
        else:
            count = min(whole + (rest > 0), most)
            sizes = [tokens // count] * count
    return tuple((size, size - 1) for size in sizes)


def _passes(
    optim: OptimConfig, rows: Sizes, longest_eval_tokens: int, rows_per_step: int
) -> Sequence["Pass"]:
    """Return what to record: steps of such micro-batches, and an evaluation of as many samples."""
    from fitune.trace.own_step import Pass, steady_passes

    evaluation = ((longest_eval_tokens, longest_eval_tokens - 1),) * len(rows)
    return steady_passes(
        optim,
        Pass("train", (rows * 2)[: max(rows_per_step, len(rows))]),
        evaluation=Pass("eval", evaluation, most_micro_batches=1) if longest_eval_tokens else None,
    )


def _host_bytes(recorded: "RecordedStep", *, offloads: bool, on_host: bool) -> int:
    """Return the bytes that a run on a card stores in the host's memory.

    offloads: whether activations are moved there.
    on_host: whether the optimizer is there.

    These are HostAdamW's copies of parameters and gradients with its state, and the activations
    that the forward of one micro-batch offloads.
    """
    sent: dict[tuple[int, int], int] = {}
    for work in recorded.work if offloads else ():
        if work.op == TRANSFER and work.phase == "forward":
            place = work.step, work.micro_batch
            sent[place] = sent.get(place, 0) + work.num_bytes
    # parameter, gradient and two moments of AdamW, in float32
    state = 16 * recorded.num_trainable_parameters if on_host else 0
    return state + max(sent.values(), default=0)


def _work_key(variant: Choice, tokens: int, supervised_fraction: float) -> str:
    return f"work {variant} {tokens} {supervised_fraction}"


def _forecast(tree: Mapping[str, Any]) -> Forecast:
    return Forecast(**{**tree, "notes": tuple(tree["notes"])})


def _step_work(tree: Mapping[str, Any]) -> StepWork:
    parts = {
        name: tuple(OpCost(**part) for part in tree[name]) for name in ("first", "later", "update")
    }
    return StepWork(**{**tree, **parts})
