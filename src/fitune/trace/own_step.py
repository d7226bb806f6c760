"""Records fitune's own training step: the model, the optimizer and the step that train, on fake tensors.

Nothing is rebuilt here: `load_model` makes the model, `assemble` what is around it, `train_step` and `evaluate` run.
Only the rows are made up, since what they hold moves no memory, and how long they are does.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.config import OptimConfig, RunConfig
from fitune.data.packing import lay_out
from fitune.data.rows import TENSORS, Batch, MicroBatch, Row
from fitune.model.head import two_logits
from fitune.model.load import count_parameters, load_model
from fitune.model.precision import Precision, device_precision, resolve_precision
from fitune.objectives import supervised as loss
from fitune.optimizers.table import OPTIMIZERS
from fitune.step.assemble import Layout, Packing, assemble, choose_layouts, choose_packing
from fitune.step.evaluate import evaluate
from fitune.step.optimizer_state import create_state
from fitune.step.work import train_step
from fitune.trace.cuda_target import CudaTarget
from fitune.trace.events import MemoryTrace, OperatorWork
from fitune.trace.interpolate import SampleCounts
from fitune.trace.loop_iterations import NUM_RECORDED_CHUNKS
from fitune.trace.patience import Patience
from fitune.trace.record import RecordedModel, RecordSettings, Step
from fitune.trace.recorder import Recorder
from fitune.trace.recording import Recording, sum_work, to_trace
from fitune.trace.shape_cache import ShapeMemory

FIRST_BFLOAT16 = (8, 0)
Kind = Literal["state", "train", "eval"]
CHUNK_LOOPS: Mapping[Kind, str] = {"train": "loss.chunks", "eval": "loss.eval_chunks"}


@dataclass(frozen=True)
class Pass:
    """What one recorded step does: the optimizer step of an effective batch, or an evaluation, of rows this long. Or
    it makes the optimizer's state, as a run does first.

    rows: (length, supervised tokens) of each. most_micro_batches: only the largest so many of those that the layout
    makes are recorded; from the third on they only repeat the second.
    """

    kind: Kind
    rows: tuple[tuple[int, int], ...] = ()
    most_micro_batches: int = 2


def steady_passes(optim: OptimConfig, steady: Pass, *, evaluation: Pass | None) -> list[Pass]:
    """What a run does until its steps are all alike. steady: a training step, with two micro-batches where it can have
    them, since the second finds the gradients of the first. One is enough where only the optimizer's state is born."""
    evaluations = [evaluation] if evaluation is not None else []
    if OPTIMIZERS[optim.name].state_comes_late:
        return [replace(steady, most_micro_batches=1), *evaluations, steady]
    return [Pass("state"), *evaluations, steady, steady]


@dataclass(frozen=True)
class RecordedStep:
    """layout: how rows became micro-batches. evaluation_step: the number of the step of the trace that is an
    evaluation, None without one. notes: what `assemble` decided. work: what the operators compute and move, summed by
    step, phase, operator and format."""

    trace: MemoryTrace
    work: tuple[OperatorWork, ...]
    layout: Layout
    chunked: bool
    evaluation_step: int | None
    num_parameters: int
    num_trainable_parameters: int
    precision: Precision
    notes: tuple[str, ...]


def target_precision(config: RunConfig, target: CudaTarget | None) -> Precision:
    """What `model.precision` means on the target: a card, or this machine's CPU where it is None."""
    if target is None:
        return resolve_precision(config.model, *device_precision(torch.device("cpu")))
    return resolve_precision(config.model, "cuda", target.compute_capability >= FIRST_BFLOAT16)


def longest_rows(
    config: RunConfig, *, num_rows: int, row_tokens: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Rows as long as they can be, every token supervised that can be: the heaviest batch there is."""
    length = row_tokens or config.data.max_length
    return ((length, length - 1),) * num_rows


def record_step(
    config: RunConfig,
    passes: Sequence[Pass],
    *,
    target: CudaTarget | None = CudaTarget(),  # noqa: B008 (frozen)
    mode: Literal["fake", "real"] = "fake",
) -> RecordedStep:
    """The memory events of these passes, in order, as the steps 1, 2, ... of the trace.

    target: the card, None for this machine's CPU. Without a pass for it the optimizer's state is born in the first
    training pass. Gradients are resident from a pass's second micro-batch on. Raises
    what `load_model` and `assemble` raise. Everything is recorded; `Recordings` gives the same for less.
    """
    return record_columns_of_step(config, passes, target=target, mode=mode).to_step()


@dataclass(frozen=True)
class ColumnsOfStep:
    """A recorded step before it is written as events. chunk_tokens: of a chunk of the loss."""

    recording: Recording
    chunk_tokens: int
    layout: Layout
    chunked: bool
    evaluation_step: int | None
    num_parameters: int
    num_trainable_parameters: int
    precision: Precision
    notes: tuple[str, ...]

    def to_step(self) -> RecordedStep:
        same = {field.name: getattr(self, field.name) for field in fields(self)}
        del same["chunk_tokens"]
        recording = same.pop("recording")
        return RecordedStep(trace=to_trace(recording), work=sum_work(recording), **same)


def model_for(
    config: RunConfig,
    *,
    target: CudaTarget | None,
    mode: Literal["fake", "real"] = "fake",
    architecture: PretrainedConfig | None = None,
    shapes: ShapeMemory | None = None,
    patience: Patience | None = None,
) -> RecordedModel:
    """For recordings of this configuration, and of others with the same model, packing, loss and routing. architecture:
    of a model with fewer layers, instead of the configured one. shapes, patience: as in `RecordedModel`."""
    precision = target_precision(config, target)

    def build() -> nn.Module:
        where = torch.device("meta" if mode == "fake" else "cpu")
        seed = config.train.seed
        model: nn.Module = load_model(
            config.model, where, precision=precision, seed=seed, config=architecture
        )
        return model

    def prepare(model: Any) -> Packing:
        packing = choose_packing(model, config)
        if mode == "fake" and not packing[0] and config.loss != "full":
            two_logits(
                model
            )  # `assemble` asks for them where there is data, and cuBLAS' workspace stays from then on
        return packing

    settings = RecordSettings(mode=mode, target=target, routing=config.memory.routing)
    return RecordedModel(build, settings, prepare=prepare, shapes=shapes, patience=patience)


def record_columns_of_step(
    config: RunConfig,
    passes: Sequence[Pass],
    *,
    target: CudaTarget | None,
    mode: Literal["fake", "real"] = "fake",
    on: RecordedModel | None = None,
    skip_chunks: bool = False,
) -> ColumnsOfStep:
    """As `record_step`. on: the model, as `model_for` makes it. skip_chunks: of the loss's chunks only the first three
    and the last are done."""
    recorded = on or model_for(config, target=target, mode=mode)
    precision = target_precision(config, target)
    device = torch.device("cpu" if target is None else "cuda")
    facts: list[dict[str, Any]] = []
    recorders: list[Recorder] = []
    evaluates = False
    # laid out before the recording, whose tensors have no data, both ways: whether it packs the model tells later
    laid_out = {
        packed: _lay_out(config, passes, device=device, packed=packed) for packed in (True, False)
    }

    def loop(model: Any, here: torch.device) -> Step:
        setup = assemble(
            model, config, device=device, precision=precision, packing=recorded.prepared
        )
        num_parameters, num_trainable_parameters = count_parameters(model)
        facts.append(
            {
                "chunk_tokens": setup.settings.loss.chunk_tokens,
                "layout": setup.layout,
                "chunked": setup.settings.loss.head is not None,
                "num_parameters": num_parameters,
                "num_trainable_parameters": num_trainable_parameters,
                "notes": setup.notes,
            }
        )
        remaining_steps = iter(laid_out[setup.layout.packed])

        def step() -> None:
            nonlocal evaluates
            kind, micro_batches = next(remaining_steps)
            evaluates = kind == "eval"
            if kind == "state":
                with recorders[0].creating_state():
                    create_state(setup.optimizer)
                    if setup.scaler is not None:
                        setup.scaler.scale(
                            torch.zeros((), device=here)
                        )  # in a run the trial before the first step
                if target is not None:
                    recorders[0].empty_cache()  # a run gives back what it tried out so far
            elif evaluates:
                evaluate(model, micro_batches, settings=setup.settings)
            else:
                train_step(
                    model,
                    setup.optimizer,
                    micro_batches,
                    settings=setup.settings,
                    scaler=setup.scaler,
                )

        return step

    @contextmanager
    def name_chunks(recorder: Recorder) -> Iterator[None]:
        recorders.append(recorder)
        slices_of = loss._chunks

        def chunks_of(num_positions: int, chunk_tokens: int) -> Iterator[slice]:
            name = CHUNK_LOOPS["eval" if evaluates else "train"]
            slices = slices_of(num_positions, chunk_tokens)
            if skip_chunks:
                slices = slices[: NUM_RECORDED_CHUNKS - 1] + slices[NUM_RECORDED_CHUNKS - 1 :][-1:]
            for number, each in enumerate(slices):
                with recorder.running(f"{name}.{number}"):
                    yield each

        with (
            patch.object(loss, "_chunks", chunks_of),
            patch.object(_OnHost, "notify", recorder.begin_micro_batch),
            patch.object(_OnHost, "is_joined", target is not None),
        ):
            yield

    with _existing_objects_frozen():
        recording = recorded.record(loop, num_steps=len(passes), watch=name_chunks)
    return ColumnsOfStep(
        recording=recording,
        evaluation_step=next(
            (i for i, each in enumerate(passes, start=1) if each.kind == "eval"), None
        ),
        precision=precision,
        **facts[0],
    )


@dataclass(frozen=True)
class StepShape:
    """Of the micro-batches that are recorded. rows: by step. num_chunks: by loop over the loss's chunks. structure:
    what else is equal where two recordings have the same structure."""

    sizes: SampleCounts
    num_chunks: Mapping[str, int]
    structure: tuple[object, ...]


def shape_of_step(
    config: RunConfig, passes: Sequence[Pass], columns: ColumnsOfStep, *, device: torch.device
) -> StepShape | None:
    """Of such passes, laid out as those of `columns`. None where the loss has another number of chunks from one
    micro-batch to the next."""
    by_step: dict[int, int] = {}
    chunks: dict[str, set[tuple[int, int]]] = {}
    structure: list[object] = [columns.chunked]
    grouped = _group(config, passes, device=device, packed=columns.layout.packed)
    for step, (each, groups) in enumerate(zip(passes, grouped, strict=True), start=1):
        if each.kind == "state":
            structure.append("state")
            continue
        counts = list(map(len, groups))
        equal = len(set(each.rows)) == 1 and len(set(counts)) == 1
        structure.append((each.kind, len(groups), each.rows[0] if equal else (each.rows, *counts)))
        by_step[step] = max(counts)
        for rows in groups if columns.chunked else ():
            parts = loss._chunks(Batch(tuple(rows)).num_supervised_tokens, columns.chunk_tokens)
            last = parts[-1].stop - parts[-1].start if parts else 0
            chunks.setdefault(CHUNK_LOOPS[each.kind], set()).add((len(parts), last))
    if any(len(found) > 1 for found in chunks.values()):
        return None
    of_loop = {loop: next(iter(found)) for loop, found in chunks.items()}
    structure += [(loop, min(number, NUM_RECORDED_CHUNKS)) for loop, (number, _) in of_loop.items()]
    counted = SampleCounts(by_step, {loop: last for loop, (_, last) in of_loop.items()})
    return StepShape(
        counted, {loop: number for loop, (number, _) in of_loop.items()}, tuple(structure)
    )


def first_rows(
    config: RunConfig, each: Pass, *, device: torch.device, packed: bool
) -> list[tuple[int, int]]:
    """(length, supervised tokens) of those of the first micro-batch."""
    ((first, *_),) = _group(config, [each], device=device, packed=packed)
    return [each.rows[row.row_id] for row in first]


def _lay_out(
    config: RunConfig, passes: Sequence[Pass], *, device: torch.device, packed: bool
) -> list[tuple[Kind, list[MicroBatch]]]:
    """The micro-batches of each pass that are recorded, in the run's order."""
    grouped = _group(config, passes, device=device, packed=packed)
    return [
        (each.kind, [_on_host(lay_out(rows, packed=packed)) for rows in groups])
        for each, groups in zip(passes, grouped, strict=True)
    ]


def _group(
    config: RunConfig, passes: Sequence[Pass], *, device: torch.device, packed: bool
) -> Iterator[list[list[Row]]]:
    """The rows of these micro-batches."""
    layouts = dict(
        zip(("train", "eval"), choose_layouts(config, device, packed=packed), strict=True)
    )
    for each in passes:
        if each.kind == "state":
            yield []
            continue
        batch = Batch(tuple(_row(number, *size) for number, size in enumerate(each.rows)))
        groups = layouts[each.kind].group(batch)
        positions = [
            sum(map(len, rows)) if packed else len(rows) * max(map(len, rows)) for rows in groups
        ]
        largest = sorted(range(len(groups)), key=lambda i: -positions[i])[: each.most_micro_batches]
        yield [groups[number] for number in sorted(largest)]


def _on_host(micro_batch: MicroBatch) -> "_OnHost":
    made = _OnHost(**{field.name: getattr(micro_batch, field.name) for field in fields(MicroBatch)})
    object.__setattr__(made, "whole", micro_batch.joined())
    return made


def _row(number: int, length: int, num_supervised: int) -> Row:
    weights = np.zeros(length, np.float32)
    weights[length - num_supervised :] = 1
    weights[0] = 0
    return Row(number, np.zeros(length, np.int32), weights)


@contextmanager
def _existing_objects_frozen() -> Iterator[None]:
    """What exists already is of no matter to the collections between steps, which would spend most of their time on
    it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _OnHost(MicroBatch):
    """Its move to the device is always a copy, as to a card. On a CPU it stands for the rows that the process holds.
    told: that it begins. whole: as `joined` gives it, made before the recording. is_joined: whether that is copied, as
    to a card."""

    notify: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    is_joined: ClassVar[bool] = False
    whole: torch.Tensor

    def to(self, device: torch.device) -> Self:
        type(self).notify()
        if type(self).is_joined:
            return self.views_of(self.whole.to(device, copy=True))
        return replace(
            self, **{name: getattr(self, name).to(device, copy=True) for name in TENSORS}
        )
