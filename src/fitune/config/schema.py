"""A run's configuration: the schema. `read_config` turns YAML and overrides into a `RunConfig`.

The schema is the only place where a key, its default and its allowed values are written down; the JSON schema for
editors, the error messages and the documentation are made from it. A value that this version cannot carry out is not
in the schema, so no key is silently without effect; a key without effect beside the others is a fault.

Paths are relative to the current directory, not to the file that they stand in; a leading ~ is the home directory.
"""

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fitune.optimizers.table import OPTIMIZERS
from fitune.units import parse_bytes, parse_seconds


def _whole_number(value: object) -> object:
    """1e6 is a float in YAML; where a count is wanted it is 1000000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _source_from_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _budget(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        if parse_bytes(value) == 0:
            raise ValueError("a memory limit of 0 bytes holds nothing")
    elif isinstance(value, bool) or not (value == "auto" or (isinstance(value, int | float) and 0 < value <= 1)):
        raise ValueError(f"{value} is neither a size like 20GiB nor a share above 0 and at most 1")
    return value


def _date(value: object) -> object:
    """YAML reads 2026-01-31 as a date."""
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"'{value}' is no date: write it like 2026-01-31") from None


def _duration(value: str) -> str:
    if parse_seconds(value) == 0:
        raise ValueError("a run of 0 seconds does nothing")
    return value


Auto = Literal["auto"]
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, gt=0), BeforeValidator(_whole_number)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
ColumnName = Annotated[str, Field(min_length=1)]
Date = Annotated[str, BeforeValidator(_date)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]

Method = Literal["full", "lora", "qlora"]
Precision = Literal["float32", "bfloat16", "autocast_bfloat16", "autocast_float16"]
Attention = Literal["flash", "efficient", "math", "eager"]
Recompute = Literal["off", "every_2", "every_4", "selective", "full"]
Shard = Literal["none", "full"]
Loss = Literal["full", "chunked"]
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow", "swanlab"]
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]

Scaling = Literal["none", "sqrt_gain", "sqrt", "linear"]
BatchMode = Literal["advise", "anneal", "follow", "hold"]
Routing = Literal["balanced", "worst"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    rank: Positive = Field(16, description="rank of the adapters")
    alpha: PositiveFloat = Field(32, description="the adapter's output is scaled by alpha / rank")
    dropout: BelowOne = Field(0.0, description="dropout before the adapters, in training")
    targets: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear")


class ShapeConfig(Section):
    """The architecture of a bare weights file (minimind's .pth), which carries none; what is left out is read off
    the tensors' shapes where they tell it."""

    preset: str | None = Field(None, description="minimind-3, minimind-3-moe, minimind2 or minimind2-small")
    hidden_size: Positive | None = Field(None, description="width of the model")
    num_layers: Positive | None = Field(None, description="number of layers")
    num_heads: Positive | None = Field(None, description="number of attention heads")
    num_kv_heads: Positive | None = Field(None, description="number of key and value heads")


class ModelConfig(Section):
    source: PathText = Field(description="preset name, directory, hub id, file.gguf or file.pth")
    tokenizer: PathText | None = Field(None, description="directory or hub id; the model's own when left out")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: train from scratch, without the model's weights"
    )
    method: Method = Field(
        "full", description="full: every weight; lora: adapters; qlora: adapters on weights in 4 bits"
    )
    lora: LoraConfig = LoraConfig()
    precision: Precision | Auto = Field("auto", description="number format of weights and computation")
    attention: Attention | Auto = Field("auto", description="attention kernel")
    recompute: Recompute | Auto = Field(
        "auto", description="gradient checkpointing: which layers are computed again in the backward"
    )
    offload_activations: Bool = Field(False, description="keep what gradient checkpointing keeps in the host's memory")
    compile: Bool = Field(False, description="compile each layer with torch.compile")
    shard: Shard = Field(
        "none", description="full: each of several processes holds a share of weights, gradients and optimizer state"
    )
    shape: ShapeConfig = ShapeConfig()
    trust_remote_code: Bool = Field(False, description="run Python code that comes with the model")


class DataSource(Section):
    path: PathText = Field(description="file, directory or hub id; '#n' at its end draws n samples")
    weight: Annotated[Float, Field(ge=1e-6, le=1e4)] = Field(
        1.0, description="how many times its samples are seen in an epoch"
    )
    max_rows: Positive | None = None


Source = Annotated[DataSource, BeforeValidator(_source_from_path, json_schema_input_type=str | DataSource)]
Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


class ColumnsConfig(Section):
    """What the rows call the columns of a format, where they do not call them so."""

    messages: ColumnName | None = Field(None, description="the list of a conversation's messages")
    role: ColumnName | None = Field(None, description="in a message, who says it")
    content: ColumnName | None = Field(None, description="in a message, its text")
    prompt: ColumnName | None = Field(None, description="the question, or the messages before the answer")
    completion: ColumnName | None = Field(None, description="the answer to learn")
    input: ColumnName | None = Field(None, description="what the question is about, written below it")
    system: ColumnName | None = Field(None, description="the system message")
    history: ColumnName | None = Field(None, description="pairs of questions and answers before the prompt")
    tools: ColumnName | None = Field(None, description="the tools that the model may call")
    text: ColumnName | None = Field(None, description="plain text, every token of which is learned")

    @property
    def named(self) -> dict[str, str]:
        """Our names, where the rows have others, with theirs."""
        return {ours: theirs for ours, theirs in self if theirs is not None}


class DataConfig(Section):
    train: PathText | Sources = Field(description="training data: a path or hub id, or a list of them")
    eval: PathText | Sources | None = Field(None, description="held-out data; else eval_fraction of train")
    eval_fraction: BelowOne = Field(0.01, description="share of the training samples held out; 0 means no evaluation")
    max_length: Annotated[int, Field(strict=True, ge=8), BeforeValidator(_whole_number)] = Field(
        2048, description="tokens of a sample; longer ones are cut or dropped"
    )
    template: PathText | None = Field(None, description="a Jinja chat template file; the tokenizer's when left out")
    mask: Literal["assistant", "last", "all"] = Field(
        "assistant", description="what is learned: the assistant's turns, the last of them alone, or every token"
    )
    system: Literal["keep", "merge"] = Field(
        "keep", description="merge: a system message becomes the front of the user's first one"
    )
    columns: ColumnsConfig = ColumnsConfig()
    ignore_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="keys of the samples to leave out of account, even those that would refuse a sample"
    )
    date: Date | None = Field(
        None, description="what a chat template writes as today's date, like 2026-01-31; that of the run's start"
    )
    too_long: Literal["truncate", "drop"] = Field(
        "truncate", description="what happens to samples that are longer than max_length"
    )
    max_rows: Positive | None = Field(None, description="so many samples of the data at most, the first ones")
    packing: Bool = Field(True, description="join samples instead of padding them")
    max_bad_fraction: Fraction = Field(0.01, description="stop when a larger share of the samples cannot be read")

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return _sources(self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...] | None:
        return None if self.eval is None else _sources(self.eval)


class BatchConfig(Section):
    effective: Positive | Auto = Field("auto", description="samples in an optimizer step, over all devices")
    micro: Positive | Auto = Field("auto", description="samples in one forward and backward")
    micro_tokens: Positive | Auto = Field("auto", description="tokens in one forward and backward")
    accumulation: Positive | Auto = Field("auto", description="micro-batches in an optimizer step")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro != "auto" and self.micro_tokens != "auto":
            raise ValueError(
                "batch.micro (samples) and batch.micro_tokens (tokens) exclude each other: give one of them"
            )
        if self.micro_tokens != "auto" and self.accumulation != "auto":
            raise ValueError(
                "batch.accumulation follows from the samples' lengths when batch.micro_tokens is given: drop it"
            )
        if "auto" not in (self.effective, self.micro, self.accumulation):
            assert isinstance(self.micro, int)
            assert isinstance(self.accumulation, int)
            product = self.micro * self.accumulation
            if product != self.effective:
                raise ValueError(
                    f"batch.micro {self.micro} x batch.accumulation {self.accumulation} = {product}, "
                    f"but batch.effective is {self.effective}: drop one of the three"
                )
        if self.accumulation != "auto" and self.effective != "auto" and self.micro == "auto":
            self._check_accumulation(self.effective, self.accumulation)
        if self.effective != "auto" and self.micro != "auto" and self.micro > self.effective:
            raise ValueError(
                f"batch.micro {self.micro} is more than batch.effective {self.effective}: lower batch.micro"
            )
        return self

    @staticmethod
    def _check_accumulation(effective: int, accumulation: int) -> None:
        """The micro-batches have equal rows but for the last one; not every count can be reached so."""
        if accumulation == -(-effective // -(-effective // accumulation)):
            return
        near = [n for n in range(1, effective + 1) if effective % n == 0]
        near.sort(key=lambda n: abs(n - accumulation))
        raise ValueError(
            f"batch.effective {effective} samples cannot be cut into batch.accumulation {accumulation} equal "
            f"micro-batches: try batch.accumulation {' or '.join(str(n) for n in sorted(near[:2]))}"
        )

    @property
    def rows_per_step(self) -> int:
        """The effective batch in rows: as given, else micro x accumulation, else 16."""
        if self.effective != "auto":
            return self.effective
        micro = self.micro if self.micro != "auto" else None
        accumulation = self.accumulation if self.accumulation != "auto" else None
        if micro is None and accumulation is None:
            return 16
        return (micro or 1) * (accumulation or 1)

    @property
    def micro_rows(self) -> int | None:
        """Rows of a micro-batch where the configuration forces them, else None."""
        if self.micro != "auto":
            return self.micro
        if self.accumulation != "auto":
            return -(-self.rows_per_step // self.accumulation)
        return None


class OptimConfig(Section):
    name: OptimizerName = Field("adamw", description="the optimizer; adamw_host keeps its state in the host's memory")
    lr: PositiveFloat | Auto = Field("auto", description="2e-5 for full fine-tuning, 2e-4 for LoRA")
    betas: tuple[BelowOne, BelowOne] = Field(
        (0.9, 0.999), description="how long AdamW averages gradients and their squares"
    )
    eps: PositiveFloat = Field(1e-8, description="added to AdamW's root of squares")
    weight_decay: Annotated[Float, Field(ge=0)] = Field(
        0.01, description="share of a weight that is taken off, times the learning rate"
    )
    clip: Annotated[Float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 switches clipping off")
    warmup: Fraction = Field(0.03, description="share of the run's tokens over which the rate rises")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="how the learning rate falls; wsd: over the last tenth"
    )
    final_lr_fraction: Fraction = Field(0.0, description="the rate at the end of the schedule, as a share of lr")
    scaling: Scaling = Field("none", description="how the rate is carried from reference_batch to batch.effective")
    reference_batch: Positive | None = Field(None, description="samples of the batch that lr was chosen for")
    noise_scale: PositiveFloat | None = Field(None, description="measured noise scale in samples, for sqrt_gain")


class MemoryConfig(Section):
    budget: Annotated[str | float, BeforeValidator(_budget)] = Field(
        "auto", description="auto, 20GiB, or a share of the free memory like 0.9"
    )
    gpu: str | None = Field(None, description="a card of the catalogue to plan for; this machine's when left out")
    on_oom: Literal["stop", "quarantine"] = Field(
        "stop", description="a sample that does not fit even alone: stop the run, or leave the sample out"
    )
    grow: Bool = Field(True, description="larger micro-batches than planned where a GPU has room and gains speed")
    allocator: str = Field("", description="PYTORCH_ALLOC_CONF of the run and of its prediction")
    routing: Routing = Field(
        "balanced",
        description="for predictions alone: tokens go to a mixture's experts evenly, or all to the same ones (worst)",
    )


class TrainConfig(Section):
    epochs: PositiveFloat | None = Field(None, description="length: passes over the data; one where no length is given")
    steps: Positive | None = Field(None, description="length: optimizer steps")
    tokens: Positive | None = Field(None, description="length: tokens, padding not counted")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63), BeforeValidator(_whole_number)] = Field(
        0, description="seed of all random numbers"
    )
    eval_every: Positive | Auto = Field("auto", description="optimizer steps between evaluations; auto: ten in a run")
    save_every: Positive | Auto = Field("auto", description="optimizer steps between saves; auto: with each evaluation")
    stop_after: Annotated[str, AfterValidator(_duration)] | None = Field(
        None, description="save and stop after this time: 11h, 90m"
    )
    batch_mode: BatchMode = Field("advise", description="when the effective batch grows by itself; advise: never")
    probe: Bool = Field(
        False, description="first try the rate halved and doubled and twice the batch; go on with the best"
    )
    probe_fraction: Annotated[Float, Field(gt=0, le=0.5)] = Field(
        0.05, description="share of the run that each setting of the probe is tried for"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [key for key in ("epochs", "steps", "tokens") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"train.{' and train.'.join(given)} exclude each other: keep one and set the other to null"
            )
        return self


class EvalConfig(Section):
    micro: Positive | Auto = Field("auto", description="samples in one forward of the evaluation")
    max_rows: Positive = Field(2000, description="samples that are evaluated, at most")


class OutputConfig(Section):
    output: Annotated[Path, AfterValidator(Path.expanduser)] = Field(Path("runs"), description="where runs are kept")
    name: str | None = Field(
        None, description="the run's directory below output; made from model and data when left out"
    )
    trackers: tuple[Tracker, ...] = Field((), description="also tell these, through the accelerate library")
    prometheus: PathText | None = Field(
        None, description="keep a text file of the present numbers here, for node_exporter's textfile collector"
    )


class RunConfig(Section):
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    loss: Loss | Auto = Field(
        "auto", description="chunked: logits of a part of the tokens at a time; the result is the same"
    )
    memory: MemoryConfig = MemoryConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        faults = []
        if self.model.method == "full":
            default = LoraConfig()
            keys = [key for key in LoraConfig.model_fields if getattr(self.model.lora, key) != getattr(default, key)]
            faults += [
                f"model.lora.{key} has no effect while model.method is full: set model.method to lora, or drop it"
                for key in keys
            ]
        if self.model.offload_activations and self.model.recompute in ("off", "auto"):
            faults.append(
                f"model.offload_activations has no effect while model.recompute is {self.model.recompute}: "
                "set model.recompute to full, selective, every_2 or every_4"
            )
        if self.data.eval is not None and self.data.eval_fraction != DataConfig.model_fields["eval_fraction"].default:
            faults.append("data.eval_fraction has no effect beside data.eval: drop one of them")
        if self.data.eval is None and self.data.eval_fraction == 0 and self.train.eval_every != "auto":
            faults.append(
                f"train.eval_every {self.train.eval_every} has no effect while data.eval_fraction is 0 and data.eval "
                "is not given: give evaluation data, or drop it"
            )
        if self.optim.schedule == "constant" and self.optim.final_lr_fraction != 0:
            faults.append("optim.final_lr_fraction has no effect while optim.schedule is constant: drop one of them")
        faults += self._scaling_without_effect()
        if self.train.batch_mode != "advise" and self.train.steps is not None:
            faults.append(
                f"train.batch_mode {self.train.batch_mode} makes steps larger, so train.steps says nothing of the "
                "run's length: give train.epochs or train.tokens"
            )
        if self.train.batch_mode == "anneal" and self.optim.schedule == "constant":
            faults.append("train.batch_mode anneal has no effect while optim.schedule is constant: drop one of them")
        faults += self._probe_without_effect()
        faults += self._not_sharded()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _not_sharded(self) -> Iterator[str]:
        model = self.model
        if model.shard == "none":
            return
        if model.method == "qlora":
            yield "model.shard full does not shard 4-bit weights: set model.method to lora, or drop it"
        if not OPTIMIZERS[self.optim.name].can_shard:
            *others, last = (name for name, kind in OPTIMIZERS.items() if kind.can_shard)
            listed = f"{', '.join(others)} or {last}"
            yield f"model.shard full does not shard the state of optim.name {self.optim.name}: use {listed}, or drop it"
        for key, is_set in (("compile", model.compile), ("offload_activations", model.offload_activations)):
            if is_set:
                yield f"model.{key} does not work with model.shard full: drop one of them"
        if self.memory.on_oom == "quarantine":
            yield (
                "memory.on_oom quarantine leaves out a sample of one process and with model.shard full every pass is "
                "one of all: set memory.on_oom to stop, or drop model.shard"
            )
        if self.train.probe:
            yield "train.probe works in one process and model.shard full needs several: drop one of them"

    def _probe_without_effect(self) -> Iterator[str]:
        train, optim = self.train, self.optim
        if not train.probe:
            if train.probe_fraction != TrainConfig.model_fields["probe_fraction"].default:
                yield "train.probe_fraction has no effect while train.probe is false: set the one or drop the other"
            return
        if train.steps is not None:
            yield (
                "train.probe tries twice the batch, so train.steps says nothing of the run's length: give train.epochs "
                "or train.tokens"
            )
        if optim.warmup >= train.probe_fraction:
            yield (
                f"train.probe_fraction {train.probe_fraction:g} ends within optim.warmup {optim.warmup:g}, before any "
                "rate is tried at its height: raise the first or lower the second"
            )
        if self.data.eval is None and self.data.eval_fraction == 0:
            yield "train.probe compares on held-out samples: give data.eval, or a data.eval_fraction above 0"

    def _scaling_without_effect(self) -> list[str]:
        optim = self.optim
        if optim.scaling == "none":
            given = [key for key in ("reference_batch", "noise_scale") if getattr(optim, key) is not None]
            return [f"optim.{key} has no effect while optim.scaling is none: set it to sqrt_gain" for key in given]
        faults = []
        if optim.reference_batch is None:
            faults.append(
                f"optim.scaling {optim.scaling} needs optim.reference_batch, the samples that lr was chosen for"
            )
        if optim.noise_scale is not None and optim.scaling != "sqrt_gain":
            faults.append(f"optim.noise_scale has no effect while optim.scaling is {optim.scaling}: drop one of them")
        return faults


def _sources(value: str | tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return (DataSource(path=value),) if isinstance(value, str) else value
