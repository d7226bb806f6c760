"""Records fitune's own training step: the model, the optimizer and the step, on fake tensors.

Nothing is rebuilt here: `load_model` makes the model, `assemble` makes what surrounds it, and
`train_step` and `evaluate` run. Only the samples are made up, since memory depends on their
lengths, and not on their content.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.config import ModelConfig, OptimConfig, RunConfig
from fitune.data.packing import lay_out
from fitune.data.rows import Batch, MicroBatch, Row, sequences_of
from fitune.model.head import two_logits
from fitune.model.load import count_parameters, load_model
from fitune.model.precision import Precision, device_precision, resolve_precision
from fitune.objectives.choose import unbound_objective
from fitune.objectives.log_probs import AnswerLogProbs
from fitune.objectives.objective import Chunking, Objective, Sweep, has_no_graph
from fitune.optimizers.table import OPTIMIZERS
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import MemoryTrace, OperatorWork
from fitune.recorder.patience import Patience
from fitune.recorder.record import RecordedModel, RecordSettings, Step
from fitune.recorder.recorder import Recorder
from fitune.recorder.recording import Recording, sum_work, to_trace
from fitune.recorder.shape_cache import ShapeMemory
from fitune.step.assemble import Layout, Packing, Setup, assemble, choose_layouts, choose_packing
from fitune.step.evaluate import evaluate
from fitune.step.optimizer_state import create_state
from fitune.step.work import train_step
from fitune.trace.interpolate import SampleCounts
from fitune.trace.loop_iterations import NUM_RECORDED_CHUNKS

#: The first compute capability that has bfloat16.
FIRST_BFLOAT16 = (8, 0)
Kind = Literal["state", "train", "eval", "reference"]
CHUNK_LOOPS: Mapping[Sweep, str] = {
    "train": "loss.chunks",
    "backward": "loss.backward_chunks",
    "eval": "loss.eval_chunks",
    "reference": "loss.reference_chunks",
    "eval_reference": "loss.eval_reference_chunks",
    "survey": "loss.survey_chunks",
    "survey_reference": "loss.survey_reference_chunks",
    "eval_survey": "loss.eval_survey_chunks",
    "eval_survey_reference": "loss.eval_survey_reference_chunks",
}


@dataclass(frozen=True)
class Pass:
    """What one recorded step does.

    It is an optimizer step of an effective batch, an evaluation, the creation of the optimizer's
    state, which a run does first, or before that the computation of a reference that is kept.
    """

    kind: Kind
    #: (length, supervised tokens) of each sample
    rows: tuple[tuple[int, int], ...] = ()
    #: only this many of the micro-batches are recorded, the largest ones; of equal ones, the third
    #: and later ones only repeat the second
    most_micro_batches: int = 2


@dataclass(frozen=True)
class PassLayouts:
    """What the samples of a pass are, and how they become micro-batches."""

    train: Layout
    eval: Layout
    #: makes up the samples; it is not bound to a model
    objective: Objective

    def group(self, each: Pass) -> list[list[Row]]:
        """Return the samples of each micro-batch of a pass that is recorded."""
        if each.kind == "state":
            return []
        rows = (
            self.objective.made_up_row(number, np.zeros(length, np.int32), num_targets)
            for number, (length, num_targets) in enumerate(each.rows)
        )
        layout = self.train if each.kind == "train" else self.eval
        groups = layout.group(
            sequences_of(rows) if each.kind == "reference" else Batch(tuple(rows))
        )
        positions = [
            sum(map(len, rows))
            if layout.packed
            else len(rows) * max(row.padded_tokens for row in rows)
            for rows in groups
        ]
        largest = sorted(range(len(groups)), key=lambda i: -positions[i])[: each.most_micro_batches]
        return [groups[number] for number in sorted(largest)]


def pass_layouts(config: RunConfig, device: torch.device, *, packed: bool) -> PassLayouts:
    layouts = choose_layouts(config.batch, config.eval, device, packed=packed)
    return PassLayouts(*layouts, unbound_objective(config))


def steady_passes(optim: OptimConfig, steady: Pass, *, evaluation: Pass | None) -> list[Pass]:
    """Return the passes that a run makes until all of its steps are alike.

    steady: a training step, with two micro-batches where it can have them, since the gradients of
        the first one are in memory while the second one runs

    One micro-batch is enough for a step that only allocates the optimizer's state.
    """
    evaluations = [evaluation] if evaluation is not None else []
    if OPTIMIZERS[optim.name].state_comes_late:
        return [replace(steady, most_micro_batches=1), *evaluations, steady]
    return [Pass("state"), *evaluations, steady, steady]


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What a recording of some passes found beside memory events and operators."""

    #: how samples became micro-batches
    layout: Layout
    #: how the loss is computed in chunks, if it is
    chunking: Chunking | None
    #: the step of the trace that is an evaluation, None without one
    evaluation_step: int | None
    num_parameters: int
    num_trainable_parameters: int
    precision: Precision
    #: what `assemble` decided
    notes: tuple[str, ...]

    @property
    def chunked(self) -> bool:
        return self.chunking is not None


@dataclass(frozen=True, kw_only=True)
class RecordedStep(StepFacts):
    """The recorded memory events and operators of some passes."""

    trace: MemoryTrace
    #: what the operators compute and move, summed by step, phase, operator and dtype
    work: tuple[OperatorWork, ...]


def target_precision(model: ModelConfig, target: CudaTarget | None) -> Precision:
    """Return what `model.precision` means on the target, which is this machine's CPU if None."""
    if target is None:
        return resolve_precision(model, *device_precision(torch.device("cpu")))
    return resolve_precision(model, "cuda", target.compute_capability >= FIRST_BFLOAT16)


def longest_rows(length: int, *, num_rows: int) -> tuple[tuple[int, int], ...]:
    """Return samples of this length, with all tokens supervised that can be."""
    return ((length, length - 1),) * num_rows


def record_step(
    config: RunConfig,
    passes: Sequence[Pass],
    *,
    target: CudaTarget | None = CudaTarget(),  # noqa: B008 (frozen)
    mode: Literal["fake", "real"] = "fake",
) -> RecordedStep:
    """Record the memory events of these passes as the steps 1, 2, ... of a trace.

    target: the card, None for this machine's CPU

    Without a pass that creates the optimizer's state, the first training pass allocates it.
    Gradients are in memory from the second micro-batch of a pass on. Everything is recorded;
    `Recordings` gives the same result at less cost. Raises what `load_model` and `assemble` raise.
    """
    return record_columns_of_step(config, passes, target=target, mode=mode).to_step()


@dataclass(frozen=True, kw_only=True)
class ColumnsOfStep(StepFacts):
    """A recorded step before it is turned into events."""

    recording: Recording

    def to_step(self) -> RecordedStep:
        facts = {field.name: getattr(self, field.name) for field in fields(StepFacts)}
        trace, work = to_trace(self.recording), sum_work(self.recording)
        return RecordedStep(trace=trace, work=work, **facts)


def model_for(
    config: RunConfig,
    *,
    target: CudaTarget | None,
    mode: Literal["fake", "real"] = "fake",
    architecture: PretrainedConfig | None = None,
    shapes: ShapeMemory | None = None,
    patience: Patience | None = None,
) -> RecordedModel:
    """Return a model for recordings of this configuration.

    It also serves configurations with the same model, packing, loss and routing.

    architecture: that of a model with fewer layers, to be recorded instead of the configured one
    shapes, patience: as in `RecordedModel`
    """
    precision = target_precision(config.model, target)

    def build() -> nn.Module:
        where = torch.device("meta" if mode == "fake" else "cpu")
        seed = config.train.seed
        model: nn.Module = load_model(
            config.model, where, precision=precision, seed=seed, config=architecture
        )
        return model

    def prepare(model: Any) -> Packing:
        packing = choose_packing(model, wanted=config.data.packing)
        if mode == "fake" and not packing[0] and config.loss != "full":
            # `assemble` asks for them where there is data; cuBLAS keeps its workspace from then on
            two_logits(model)
        return packing

    settings = RecordSettings(mode=mode, target=target, routing=config.memory.routing)
    return RecordedModel(build, settings, prepare=prepare, shapes=shapes, patience=patience)


def _load_frozen_copy(recorder: Recorder, objective: Objective) -> None:
    """Record the weights of a reference as those of the model, whose layers are repeated."""
    live = objective.reference if isinstance(objective, AnswerLogProbs) else None
    if live is not None and live.copy is not None:
        recorder.load(live.copy)


def _create_state(setup: Setup, recorder: Recorder, device: torch.device) -> None:
    with recorder.creating_state():
        create_state(setup.optimizer)
        if setup.scaler is not None:
            # a run scales a loss in its trial before the first step
            setup.scaler.scale(torch.zeros((), device=device))


def record_columns_of_step(
    config: RunConfig,
    passes: Sequence[Pass],
    *,
    target: CudaTarget | None,
    mode: Literal["fake", "real"] = "fake",
    on: RecordedModel | None = None,
    skip_chunks: bool = False,
) -> ColumnsOfStep:
    """Record the passes as `record_step` does, and return the columns.

    on: the model, as `model_for` returns it
    skip_chunks: compute only the first three chunks of the loss and the last
    """
    recorded = on or model_for(config, target=target, mode=mode)
    precision = target_precision(config.model, target)
    device = torch.device("cpu" if target is None else "cuda")
    facts: list[dict[str, Any]] = []
    recorders: list[Recorder] = []
    # The micro-batches are laid out before the recording, whose tensors have no data. Whether the
    # model takes packed samples is not known yet, so both layouts are made.
    laid_out = {
        packed: _lay_out(
            passes,
            pass_layouts(config, device, packed=packed),
            begin=lambda: recorders[0].begin_micro_batch(),
            is_joined=device.type == "cuda",
        )
        for packed in (True, False)
    }

    def watched_chunks(slices: list[slice], sweep: Sweep) -> Iterator[slice]:
        name = CHUNK_LOOPS[sweep]
        if skip_chunks:
            slices = slices[: NUM_RECORDED_CHUNKS - 1] + slices[NUM_RECORDED_CHUNKS - 1 :][-1:]
        for number, each in enumerate(slices):
            with recorders[0].running(f"{name}.{number}"):
                yield each

    def loop(model: Any, here: torch.device) -> Step:
        setup = assemble(
            model, config, device=device, precision=precision, packing=recorded.prepared
        )
        num_parameters, num_trainable_parameters = count_parameters(model)
        objective = setup.settings.objective
        _load_frozen_copy(recorders[0], objective)
        settings = replace(setup.settings, objective=objective.watched(watched_chunks))
        facts.append(
            {
                "chunking": objective.chunking,
                "layout": setup.layout,
                "num_parameters": num_parameters,
                "num_trainable_parameters": num_trainable_parameters,
                "notes": setup.notes,
            }
        )
        remaining_steps = iter(laid_out[setup.layout.packed])

        def step() -> None:
            kind, micro_batches = next(remaining_steps)
            if kind == "state":
                _create_state(setup, recorders[0], here)
            elif kind == "train":
                train_step(
                    model,
                    setup.optimizer,
                    micro_batches,
                    settings=settings,
                    scaler=setup.scaler,
                )
            else:
                of_kind = settings if kind == "eval" else settings.of_reference()
                evaluate(model, micro_batches, settings=of_kind)
            if target is not None and kind in ("state", "reference"):
                # a run empties the cache after its trials, and after a reference
                recorders[0].empty_cache()

        return step

    @contextmanager
    def remember(recorder: Recorder) -> Iterator[None]:
        recorders.append(recorder)
        yield

    with _existing_objects_frozen():
        recording = recorded.record(loop, num_steps=len(passes), watch=remember)
    return ColumnsOfStep(
        recording=recording,
        evaluation_step=next(
            (i for i, each in enumerate(passes, start=1) if each.kind == "eval"), None
        ),
        precision=precision,
        **facts[0],
    )


@dataclass(frozen=True)
class RecordedShape:
    """The sizes of the recorded micro-batches, and what else their structure depends on."""

    sizes: SampleCounts
    #: the number of chunks of the loss, by loop over them
    num_chunks: Mapping[str, int]
    #: two recordings with the same structure have this in common
    structure: tuple[object, ...]


def shape_of_step(
    passes: Sequence[Pass], columns: ColumnsOfStep, layouts: PassLayouts
) -> RecordedShape | None:
    """Return the shape of these passes if their loss is computed as that of `columns`.

    Returns None if the loss has another number of chunks from one micro-batch to the next.
    """
    by_step: dict[int, int] = {}
    chunks: dict[str, set[tuple[int, int]]] = {}
    chunking = columns.chunking
    structure: list[object] = [columns.chunked]
    for step, each in enumerate(passes, start=1):
        groups = layouts.group(each)
        if each.kind == "state":
            structure.append("state")
            continue
        counts = list(map(len, groups))
        equal = len(set(each.rows)) == 1 and len(set(counts)) == 1
        structure.append((each.kind, len(groups), each.rows[0] if equal else (each.rows, *counts)))
        by_step[step] = max(counts)
        if chunking is None:
            continue
        for rows in groups:
            num_tokens = Batch(tuple(rows)).num_supervised_tokens
            for sweep in chunking.sweeps(evaluates=each.kind != "train"):
                parts = chunking.slices(num_tokens, evaluates=has_no_graph(sweep))
                last = parts[-1].stop - parts[-1].start if parts else 0
                chunks.setdefault(CHUNK_LOOPS[sweep], set()).add((len(parts), last))
    if any(len(found) > 1 for found in chunks.values()):
        return None
    of_loop = {loop: next(iter(found)) for loop, found in chunks.items()}
    structure += [(loop, min(number, NUM_RECORDED_CHUNKS)) for loop, (number, _) in of_loop.items()]
    counted = SampleCounts(by_step, {loop: last for loop, (_, last) in of_loop.items()})
    return RecordedShape(
        counted, {loop: number for loop, (number, _) in of_loop.items()}, tuple(structure)
    )


def _lay_out(
    passes: Sequence[Pass],
    layouts: PassLayouts,
    *,
    begin: Callable[[], None],
    is_joined: bool,
) -> list[tuple[Kind, list[MicroBatch]]]:
    """Return the micro-batches of each pass that are recorded, in the run's order.

    begin: called when a micro-batch moves to the device
    is_joined: whether its tensors move there in one copy
    """
    packed = layouts.train.packed
    return [
        (
            each.kind,
            [
                _on_host(lay_out(rows, packed=packed), begin, is_joined)
                for rows in layouts.group(each)
            ],
        )
        for each in passes
    ]


def _on_host(micro_batch: MicroBatch, begin: Callable[[], None], is_joined: bool) -> "_OnHost":
    values = {field.name: getattr(micro_batch, field.name) for field in fields(MicroBatch)}
    whole = micro_batch.joined() if is_joined else None
    answers = micro_batch.answers
    if answers is not None and answers.mismatched is not None:
        # a survey is a part of the micro-batch that runs
        other = _on_host(answers.mismatched, lambda: None, is_joined)
        values["answers"] = replace(answers, mismatched=other)
    return _OnHost(**values, begin=begin, whole=whole)


@contextmanager
def _existing_objects_frozen() -> Iterator[None]:
    """Leave older objects out of the collections between steps.

    The collections would spend most of their time on them.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True, kw_only=True)
class _OnHost(MicroBatch):
    """A micro-batch whose move to the device is always a copy, as a move to a card is.

    On a CPU it stands for the samples in the memory of the process.
    """

    #: is called when the micro-batch begins
    begin: Callable[[], None]
    #: the tensors joined into one before the recording, as they are copied to a card; else None
    whole: torch.Tensor | None

    def to(self, device: torch.device) -> Self:
        self.begin()
        if self.whole is not None:
            return self.views_of(self.whole.to(device, copy=True))
        return self.with_tensors([part.to(device, copy=True) for part in self.tensors])
