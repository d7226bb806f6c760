"""Predicts the memory of a built `Trainer` or `SFTTrainer`, before `.train()` and without a GPU.

A copy of the trainer, with a model of fake tensors, runs the Trainer's own set-up and epochs of
one step of its own loop. `training_step`, clipping, optimizer and schedule are therefore the
Trainer's; none of them is reimplemented here. The trainer itself, its model, its optimizer and the
states of the random number generators remain unchanged.
"""

import copy
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import pyarrow.compute
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    modeling_utils,
    training_args,
)
from transformers.trainer_callback import CallbackHandler

import fitune
from fitune.allocator.prediction import Prediction
from fitune.boundary import bounded
from fitune.errors import UsageError
from fitune.integrations.versions import check_alone, check_trainer
from fitune.machine.devices import this_machine
from fitune.recorder.assumptions import provide_data
from fitune.recorder.record import Build, Loop, Step
from fitune.recorder.script_libraries import models_of_configs
from fitune.recorder.triton_kernels import triton_kernels
from fitune.step.random_state import streams_kept

#: The micro-batches that are recorded of a step: the first begins without gradients, the second
#: adds to them, and any further one does the same as the second.
RECORDED_MICRO_BATCHES = 2


@bounded("fitune.predict_trainer")
def predict_trainer(
    trainer: Trainer,
    *,
    gpu: str | None = None,
    num_steps: int = 3,
    attention: Literal["auto", "flash", "efficient", "math", "eager"] = "auto",
    routing: Literal["balanced", "worst"] = "balanced",
) -> Prediction:
    """Predict the memory of the trainer's heaviest step.

    Every micro-batch of that step consists of the longest samples of the train dataset, batched by
    the trainer's own collator. A trainer whose model has no weights (see `weightless`) gets the
    same prediction. What callbacks, logging, evaluation and saving allocate is not included.

    gpu, num_steps, attention, routing: as for `fitune.predict_loop`.

    Raises UsageError for an unknown card, an unsupported version of transformers or TRL, several
    devices, a quantised model, and a trainer with a second model.
    """
    check_trainer(trainer)
    check_alone(trainer)
    _check_model(trainer)
    with streams_kept(trainer.args.device):
        recorded = record_trainer(trainer)
        on_card = gpu != "cpu" if gpu is not None else bool(list(this_machine()))
        with triton_kernels() if on_card else nullcontext():
            prediction = fitune.predict_loop(
                recorded.build,
                recorded.loop,
                gpu=gpu,
                num_steps=num_steps,
                attention=attention,
                routing=routing,
            )
    return replace(prediction, assumptions=(recorded.rows, *prediction.assumptions))


@contextmanager
def weightless() -> Iterator[None]:
    """Build models without weights in this block, for `predict_trainer`.

    The model then need not fit into this machine's memory: it is built on PyTorch's meta device,
    by `from_pretrained` from its configuration alone, and a Trainer built in the block leaves it
    there. Such a Trainer cannot train. Arguments for a card, such as bf16, are accepted without one.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(patch.object(Trainer, "_move_model_to_device", lambda *_: None))
        stack.enter_context(
            patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True)
        )
        stack.enter_context(models_of_configs(modeling_utils, lambda _: None, has_card=False))
        yield


@dataclass(frozen=True)
class HeaviestBatch:
    """The batch that the collator makes of the longest samples, on the host."""

    values: dict[str, Any]
    #: which samples they are, as text for the assumptions of the prediction
    rows: str

    def place(self, device: torch.device) -> dict[str, Any]:
        """Return the batch on `device`, copied from the host as a DataLoader does.

        A fake tensor is registered with its real data, because models read them: whether a mask
        masks anything, and where packed samples begin.
        """
        placed = dict(self.values)
        for name, value in self.values.items():
            if isinstance(value, torch.Tensor):
                placed[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value).to(device)
                if isinstance(placed[name], FakeTensor):
                    provide_data(placed[name], value)
        return placed


@dataclass(frozen=True)
class RecordedTrainer:
    """A trainer in the form that `trace.record.record_loop` takes."""

    build: Build
    loop: Loop
    #: which samples it trains on, as text for the assumptions of the prediction
    rows: str


def record_trainer(trainer: Trainer, *, mode: Literal["fake", "real"] = "fake") -> RecordedTrainer:
    """Return functions that build the trainer's model and run its steps.

    mode: "fake" copies only the shapes of the model; "real" copies its values too, so that the
    steps can be run.
    """
    shadow = _shadow(trainer, to_meta=mode == "fake")
    batch = _heaviest_batch(shadow, trainer.train_dataset)
    unused = [shadow]

    def build() -> Any:
        nonlocal shadow
        shadow = unused.pop() if unused else _shadow(trainer, to_meta=mode == "fake")
        return shadow.model

    return RecordedTrainer(
        build, lambda model, _: _set_up(shadow, trainer, batch, model=model), batch.rows
    )


def _check_model(trainer: Trainer) -> None:
    if getattr(trainer.model, "is_quantized", False):
        raise UsageError(
            "a quantised model cannot be recorded from its Trainer: use fitune plan model.method=qlora"
        )
    for name, value in vars(trainer).items():
        if isinstance(value, nn.Module) and value not in (trainer.model, trainer.model_wrapped):
            raise UsageError(
                f"{type(trainer).__name__} holds a second model ({name}): Trainer and SFTTrainer are known"
            )
    if getattr(trainer.args, "activation_offloading", False):
        raise UsageError("activation_offloading=True is not known to the prediction: leave it off")


# ---- a copy of the trainer ----


def _shadow(trainer: Trainer, *, to_meta: bool) -> Trainer:
    """Copy the trainer without callbacks, data and optimizer.

    The copy has its own model, counters and bookkeeping, so that its steps leave the trainer as
    it is.
    """
    memo: dict[int, object] = {}
    model = copy_model(trainer.model, memo, to_meta=to_meta)
    shadow: Trainer = copy.copy(trainer)
    shadow.train_dataset = shadow.eval_dataset = None
    for name, value in vars(shadow).items():
        if isinstance(value, (dict, list, set)):
            setattr(shadow, name, copy.deepcopy(value, memo))
        elif isinstance(value, types.MethodType) and value.__self__ is trainer:
            setattr(shadow, name, types.MethodType(value.__func__, shadow))
    shadow.model = shadow.model_wrapped = model
    shadow.optimizer = shadow.lr_scheduler = shadow.model_init = None
    shadow.args = copy.copy(trainer.args)
    shadow.args.auto_find_batch_size = False
    shadow.accelerator = copy.copy(trainer.accelerator)
    for name in ("_models", "_optimizers", "_schedulers", "_dataloaders"):
        setattr(shadow.accelerator, name, [])
    shadow.state, shadow.control = TrainerState(), TrainerControl()
    shadow.callback_handler = CallbackHandler(
        [_NoFlow()], model, trainer.processing_class, None, None
    )
    return shadow


class _NoFlow(DefaultFlowCallback):  # type: ignore[misc]
    """A callback that never logs, evaluates or saves.

    It is a DefaultFlowCallback because the Trainer warns where it has none.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **unused: object,
    ) -> TrainerControl:
        return control

    on_epoch_end = on_step_end


def copy_model(model: nn.Module, memo: dict[int, object], *, to_meta: bool) -> nn.Module:
    """Return a deep copy of the model.

    Tensors and modules that the model shares are shared in the copy too, also where a function
    that replaced a module's forward refers to them.

    memo: as for `copy.deepcopy`.
    to_meta: copy shapes and dtypes alone, to PyTorch's meta device.
    """
    if to_meta:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers, module.__dict__):
                for tensor in tensors.values():
                    if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                        memo[id(tensor)] = _on_meta(tensor)
    copied: nn.Module = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, types.MethodType) and (function := _rebound(value.__func__, memo)):
                module.__dict__[name] = types.MethodType(function, value.__self__)
            elif isinstance(value, types.FunctionType) and (function := _rebound(value, memo)):
                module.__dict__[name] = function
    return copied


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _rebound(function: Any, memo: dict[int, object]) -> types.FunctionType | None:
    """Return the function with its closure over the copies of the modules.

    Returns None where the function closes over no module.
    """
    cells = getattr(function, "__closure__", None) or ()
    contents = [cell.cell_contents for cell in cells]
    if not any(
        isinstance(each, nn.Module) or isinstance(_owner(each), nn.Module) for each in contents
    ):
        return None
    bound = tuple(
        types.CellType(
            copy.deepcopy(each, memo) if isinstance(each, (nn.Module, types.MethodType)) else each
        )
        for each in contents
    )
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, bound
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _owner(value: object) -> object:
    return value.__self__ if isinstance(value, types.MethodType) else None


# ---- the trainer's loop ----


def _set_up(shadow: Trainer, trainer: Trainer, batch: HeaviestBatch, *, model: nn.Module) -> Step:
    """Run the Trainer's own preparation, and return a function that runs an epoch of one step."""
    num_micro_batches = trainer.args.gradient_accumulation_steps
    num_recorded = min(num_micro_batches, RECORDED_MICRO_BATCHES)
    if trainer.optimizer is not None:
        originals = map(id, trainer.model.parameters())
        shadow.optimizer = _copy_optimizer(
            trainer.optimizer, dict(zip(originals, model.parameters(), strict=True))
        )
    if shadow.accelerator.scaler is not None:
        shadow.accelerator.scaler = torch.amp.GradScaler("cuda")
    # so that .train() does all that precedes its loop, and no more: it sets up gradient
    # checkpointing, noise on embeddings, the optimizer and autocast
    shadow._inner_training_loop = lambda **_: shadow._prepare_for_training(1000, None, None)[0]
    prepared = shadow.train()
    shadow._tr_loss = torch.tensor(0.0, device=trainer.args.device)
    shadow._total_loss_scalar, shadow._globalstep_last_logged = 0.0, 0

    def loader() -> Iterator[dict[str, Any]]:
        # the Trainer fetches the batches of a whole step before its first forward
        held = [batch.place(trainer.args.device) for _ in range(num_micro_batches - num_recorded)]
        for _ in range(num_recorded):
            yield batch.place(trainer.args.device)
        del held

    def step() -> None:
        shadow._run_epoch(
            model=prepared,
            epoch=0,
            train_dataloader=_Loader(loader),
            steps_in_epoch=num_recorded,
            num_update_steps_per_epoch=1,
            trial=None,
            ignore_keys_for_eval=None,
            start_time=time.time(),
            resume_from_checkpoint=None,
            epochs_trained=0,
            steps_trained_in_current_epoch=0,
        )

    return step


@dataclass(frozen=True)
class _Loader:
    batches: Callable[[], Iterator[dict[str, object]]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.batches()


def _copy_optimizer(optimizer: Any, twins: dict[int, torch.Tensor]) -> torch.optim.Optimizer:
    """Return the same optimizer, without state, for the copied parameters.

    twins: the copy of each parameter, by the parameter's id.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, once the trainer has trained
        optimizer = optimizer.optimizer
    copied: torch.optim.Optimizer = copy.copy(optimizer)
    copied.state = defaultdict(dict)
    copied.param_groups = [
        {**group, "params": [twins[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return copied


# ---- the trainer's heaviest batch ----


def _heaviest_batch(shadow: Trainer, dataset: Any) -> HeaviestBatch:
    """Collate the longest samples of the dataset, or the first ones if it is only an iterable.

    Raises UsageError if the lengths of the samples cannot be found.
    """
    size = shadow.args.per_device_train_batch_size
    if dataset is None:
        raise UsageError(
            "the Trainer has no train_dataset, whose longest samples the prediction is made from"
        )
    collate = shadow.data_collator
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        lengths = _row_lengths(dataset)
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        rows = [order[place % len(order)] for place in range(size)]
        what = f"recorded with the {size} longest samples of {len(lengths):,}, the longest of {lengths[order[0]]:,} tokens"
        if hasattr(dataset, "select"):
            dataset = shadow._remove_unused_columns(dataset.select(rows), description="training")
            features = [dataset[place] for place in range(size)]
        else:
            collate = shadow._get_collator_with_removed_columns(collate, description="training")
            features = [dataset[place] for place in rows]
    else:
        if hasattr(dataset, "take"):
            dataset = shadow._remove_unused_columns(dataset, description="training")
        first = [row for row, _ in zip(dataset, range(size), strict=False)]
        features = [first[place % len(first)] for place in range(size)]
        what = f"recorded with the first {size} samples of a dataset that cannot be looked at as a whole"
    values = dict(collate(features))
    return HeaviestBatch(values, what)


def _row_lengths(dataset: Any) -> Sequence[int]:
    """Return the number of tokens of each sample. Raises UsageError if there are no input_ids."""
    if len(dataset) == 0:
        raise UsageError("the Trainer's train_dataset has no samples")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "input_ids" in columns and hasattr(dataset, "with_format"):
        lengths: list[int] = []
        for table in (
            dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
        ):
            lengths += pyarrow.compute.list_value_length(table["input_ids"]).to_pylist()
        return lengths
    first = dataset[0]
    if not hasattr(first, "__getitem__") or "input_ids" not in first:
        raise UsageError(
            "the samples of the Trainer's train_dataset have no input_ids: tokenise them first"
        )
    return [len(dataset[place]["input_ids"]) for place in range(len(dataset))]
