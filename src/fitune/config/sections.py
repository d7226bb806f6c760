"""Define the sections of a run's configuration: their keys, defaults and allowed values."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fitune.config.trained_parts import FreezeConfig, LoraConfig, Section
from fitune.config.values import (
    Attention,
    Auto,
    BatchMode,
    BelowOne,
    Bool,
    ColumnName,
    Date,
    Duration,
    Float,
    Fraction,
    MemoryLimit,
    Method,
    OptimizerName,
    PairLoss,
    PathText,
    Positive,
    Precision,
    Rate,
    Recompute,
    ReferenceKind,
    Samples,
    Scale,
    Scaling,
    Shard,
    Tokens,
    Tracker,
    WholeNumber,
)
from fitune.recorder.routing import Routing


def _source_from_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class ShapeConfig(Section):
    """Holds the architecture of a weights file without a configuration (minimind's .pth).

    A key that is left out is inferred from the shapes of the tensors where they determine it.
    """

    preset: str | None = Field(
        None, description="minimind-3, minimind-3-moe, minimind2 or minimind2-small"
    )
    hidden_size: Positive | None = Field(None, description="width of the model")
    num_layers: Positive | None = Field(None, description="number of layers")
    num_heads: Positive | None = Field(None, description="number of attention heads")
    num_kv_heads: Positive | None = Field(None, description="number of key and value heads")


class ModelConfig(Section):
    source: PathText = Field(description="preset name, directory, hub id, file.gguf or file.pth")
    tokenizer: PathText | None = Field(
        None, description="directory or hub id; the model's own when left out"
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: train from scratch, without the model's weights"
    )
    method: Method = Field(
        "full",
        description=(
            "full: every weight; freeze: some layers; lora: adapters; qlora: adapters on weights "
            "in 4 bits"
        ),
    )
    lora: LoraConfig = LoraConfig()
    freeze: FreezeConfig = FreezeConfig()
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description=(
            "tokens that the vocabulary gets; with adapters their rows of embedding and head are "
            "trained"
        ),
    )
    precision: Precision | Auto = Field(
        "auto", description="number format of weights and computation"
    )
    attention: Attention | Auto = Field("auto", description="attention kernel")
    recompute: Recompute | Auto = Field(
        "auto",
        description="gradient checkpointing: which layers are computed again in the backward",
    )
    offload_activations: Bool = Field(
        False, description="keep what gradient checkpointing keeps in the host's memory"
    )
    compile: Bool = Field(False, description="compile each layer with torch.compile")
    shard: Shard = Field(
        "none",
        description=(
            "full: each of several processes holds a share of weights, gradients and optimizer state"
        ),
    )
    shape: ShapeConfig = ShapeConfig()
    trust_remote_code: Bool = Field(False, description="run Python code that comes with the model")

    @property
    def has_adapters(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random masks."""
        return self.has_adapters and self.lora.dropout > 0


class DataSource(Section):
    path: PathText = Field(description="file, directory or hub id; '#n' at its end draws n samples")
    weight: Annotated[Float, Field(ge=1e-6, le=1e4)] = Field(
        1.0, description="how many times its samples are seen in an epoch"
    )
    max_rows: Positive | None = None


Source = Annotated[
    DataSource, BeforeValidator(_source_from_path, json_schema_input_type=str | DataSource)
]
Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


class ColumnsConfig(Section):
    """Maps the fields of a data format to the columns that hold them under another name."""

    messages: ColumnName | None = Field(None, description="the list of a conversation's messages")
    role: ColumnName | None = Field(None, description="in a message, who says it")
    content: ColumnName | None = Field(None, description="in a message, its text")
    prompt: ColumnName | None = Field(
        None, description="the question, or the messages before the answer"
    )
    completion: ColumnName | None = Field(None, description="the answer to learn")
    chosen: ColumnName | None = Field(None, description="of a pair, the better answer")
    rejected: ColumnName | None = Field(None, description="of a pair, the worse answer")
    label: ColumnName | None = Field(None, description="of kto, whether the answer is desirable")
    input: ColumnName | None = Field(
        None, description="what the question is about, written below it"
    )
    system: ColumnName | None = Field(None, description="the system message")
    history: ColumnName | None = Field(
        None, description="pairs of questions and answers before the prompt"
    )
    tools: ColumnName | None = Field(None, description="the tools that the model may call")
    text: ColumnName | None = Field(None, description="plain text, every token of which is learned")

    @property
    def named(self) -> dict[str, str]:
        """Return {our name of a column: its name in the data} for the columns that are renamed."""
        return {ours: theirs for ours, theirs in self if theirs is not None}


class DataConfig(Section):
    train: PathText | Sources = Field(
        description="training data: a path or hub id, or a list of them"
    )
    eval: PathText | Sources | None = Field(
        None, description="held-out data; else eval_fraction of train"
    )
    eval_fraction: BelowOne = Field(
        0.01, description="share of the training samples held out; 0 means no evaluation"
    )
    max_length: Annotated[int, Field(strict=True, ge=8, le=10**9), WholeNumber] = Field(
        2048, description="tokens of a sample; longer ones are cut, dropped or split"
    )
    template: PathText | None = Field(
        None, description="a Jinja chat template file; the tokenizer's when left out"
    )
    mask: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description=(
            "what is learned: the assistant's turns, the last of them alone, or every token"
        ),
    )
    system: Literal["keep", "merge"] = Field(
        "keep", description="merge: a system message becomes the front of the user's first one"
    )
    columns: ColumnsConfig = ColumnsConfig()
    ignore_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description=(
            "keys of the samples to leave out of account, even those that would refuse a sample"
        ),
    )
    date: Date | None = Field(
        None,
        description=(
            "what a chat template writes as today's date, like 2026-01-31; that of the run's start"
        ),
    )
    too_long: Literal["truncate", "drop", "split"] = Field(
        "truncate",
        description=(
            "what happens to samples that are longer than max_length; split: a plain text "
            "becomes several samples"
        ),
    )
    wrapped: Bool = Field(
        False,
        description=(
            "join plain texts and cut them into samples of max_length tokens: attention crosses "
            "the texts' borders"
        ),
    )
    max_rows: Positive | None = Field(
        None, description="so many samples of the data at most, the first ones"
    )
    packing: Bool = Field(True, description="join samples instead of padding them")
    max_bad_fraction: Fraction = Field(
        0.01, description="stop when a larger share of the samples cannot be read"
    )

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return _sources(self.train)

    @property
    def is_evaluated(self) -> bool:
        """Whether some samples are held out, or given, to evaluate with."""
        return self.eval is not None or self.eval_fraction > 0

    @property
    def eval_sources(self) -> tuple[DataSource, ...] | None:
        return None if self.eval is None else _sources(self.eval)


class PreferenceConfig(Section):
    """Says how a chosen answer is preferred to a rejected one, with the names of TRL's settings."""

    beta: Scale = Field(
        0.1,
        description="dpo: how closely the model stays at the reference; orpo: weight of the odds ratio",
    )
    loss_type: PairLoss = Field("sigmoid", description="of dpo: what it makes of a pair's margin")
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="probability that a pair's label is wrong, for sigmoid and robust"
    )
    simpo_gamma: Annotated[Float, Field(ge=0, le=100)] = Field(
        0.5, description="of simpo: the margin that a chosen answer should have"
    )
    desirable_weight: Annotated[Float, Field(gt=0, le=1000)] = Field(
        1.0, description="of kto: weight of the losses of desirable answers"
    )
    undesirable_weight: Annotated[Float, Field(gt=0, le=1000)] = Field(
        1.0, description="of kto: weight of the losses of answers that are not desirable"
    )
    reference: ReferenceKind | Auto = Field(
        "auto",
        description=(
            "of dpo and kto: kept computes its log-probabilities once, adapter_off and frozen_copy in each step"
        ),
    )


class BatchConfig(Section):
    effective: Samples | Auto = Field(
        "auto", description="samples in an optimizer step, over all devices"
    )
    micro: Samples | Auto = Field("auto", description="samples in one forward and backward")
    micro_tokens: Positive | Auto = Field("auto", description="tokens in one forward and backward")
    accumulation: Samples | Auto = Field("auto", description="micro-batches in an optimizer step")

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
                    f"batch.micro {self.micro} x batch.accumulation {self.accumulation} = "
                    f"{product}, "
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
        """Raise ValueError if the batch cannot be split into this many micro-batches.

        All micro-batches but the last have the same number of samples, so some counts are
        impossible.
        """
        if accumulation == -(-effective // -(-effective // accumulation)):
            return
        near = [n for n in range(1, effective + 1) if effective % n == 0]
        near.sort(key=lambda n: abs(n - accumulation))
        raise ValueError(
            f"batch.effective {effective} samples cannot be cut into batch.accumulation "
            f"{accumulation} equal "
            f"micro-batches: try batch.accumulation {' or '.join(str(n) for n in sorted(near[:2]))}"
        )

    @property
    def rows_per_step(self) -> int:
        """Return the effective batch in samples: as given, else micro x accumulation, else 16."""
        if self.effective != "auto":
            return self.effective
        micro = self.micro if self.micro != "auto" else None
        accumulation = self.accumulation if self.accumulation != "auto" else None
        if micro is None and accumulation is None:
            return 16
        return (micro or 1) * (accumulation or 1)

    @property
    def micro_rows(self) -> int | None:
        """Return the samples of a micro-batch if the configuration fixes them, else None."""
        if self.micro != "auto":
            return self.micro
        if self.accumulation != "auto":
            return -(-self.rows_per_step // self.accumulation)
        return None

    @property
    def is_micro_open(self) -> bool:
        """Whether the size of micro-batches is left to the plan."""
        return self.micro_rows is None and self.micro_tokens == "auto"


class OptimConfig(Section):
    name: OptimizerName = Field(
        "adamw", description="the optimizer; adamw_host keeps its state in the host's memory"
    )
    lr: Rate | Auto = Field(
        "auto", description="2e-5 for full fine-tuning, 2e-4 for LoRA; of preferences a twentieth"
    )
    betas: tuple[BelowOne, BelowOne] = Field(
        (0.9, 0.999), description="how long AdamW averages gradients and their squares"
    )
    eps: Annotated[Float, Field(ge=1e-30, le=1)] = Field(
        1e-8, description="added to AdamW's root of squares"
    )
    weight_decay: Annotated[Float, Field(ge=0, le=1000)] = Field(
        0.01, description="share of a weight that is taken off, times the learning rate"
    )
    clip: Annotated[Float, Field(ge=0, le=1e9)] = Field(
        1.0, description="largest gradient norm; 0 switches clipping off"
    )
    warmup: Fraction = Field(
        0.03, description="share of the run's tokens over which the rate rises"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="how the learning rate falls; wsd: over the last tenth"
    )
    final_lr_fraction: Fraction = Field(
        0.0, description="the rate at the end of the schedule, as a share of lr"
    )
    scaling: Scaling = Field(
        "none", description="how the rate is carried from reference_batch to batch.effective"
    )
    reference_batch: Samples | None = Field(
        None, description="samples of the batch that lr was chosen for"
    )
    noise_scale: Scale | None = Field(
        None, description="measured noise scale in samples, for sqrt_gain"
    )


class MemoryConfig(Section):
    budget: MemoryLimit = Field(
        "auto", description="auto, 20GiB, or a share of the free memory like 0.9"
    )
    gpu: str | None = Field(
        None, description="a card of the catalogue to plan for; this machine's when left out"
    )
    on_oom: Literal["stop", "quarantine"] = Field(
        "stop",
        description="a sample that does not fit even alone: stop the run, or leave the sample out",
    )
    grow: Bool = Field(
        True, description="larger micro-batches than planned where a GPU has room and gains speed"
    )
    allocator: str = Field("", description="PYTORCH_ALLOC_CONF of the run and of its prediction")
    routing: Routing = Field(
        "balanced",
        description=(
            "for predictions alone: tokens go to a mixture's experts evenly, or all to the same ones (worst)"
        ),
    )


class TrainConfig(Section):
    epochs: Annotated[Float, Field(gt=0, le=1e6)] | None = Field(
        None, description="length: passes over the data; one where no length is given"
    )
    steps: Positive | None = Field(None, description="length: optimizer steps")
    tokens: Tokens | None = Field(None, description="length: tokens, padding not counted")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63), WholeNumber] = Field(
        0, description="seed of all random numbers"
    )
    label_smoothing: BelowOne = Field(
        0.0, description="share of each target that is spread over all tokens of the vocabulary"
    )
    eval_every: Positive | Auto = Field(
        "auto",
        description="optimizer steps between evaluations; auto: ten in a run, and at least five steps apart",
    )
    save_every: Positive | Auto = Field(
        "auto", description="optimizer steps between saves; auto: with each evaluation"
    )
    stop_after: Duration | None = Field(None, description="save and stop after this time: 11h, 90m")
    batch_mode: BatchMode = Field(
        "advise", description="when the effective batch grows by itself; advise: never"
    )
    probe: Bool = Field(
        False,
        description=(
            "first try the rate halved and doubled and twice the batch; go on with the best"
        ),
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
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="questions that are answered, and the answers kept, at each evaluation"
    )
    new_tokens: Positive = Field(64, description="tokens of an answer to eval.prompts, at most")
    patience: Positive | None = Field(
        None,
        description=(
            "early stopping: the run ends after so many successive evaluations without a better loss"
        ),
    )


class OutputConfig(Section):
    output: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        Path("runs"), description="where runs are kept"
    )
    name: str | None = Field(
        None, description="the run's directory below output; made from model and data when left out"
    )
    trackers: tuple[Tracker, ...] = Field(
        (), description="also tell these, through the accelerate library"
    )
    prometheus: PathText | None = Field(
        None,
        description=(
            "keep a text file of the present numbers here, for node_exporter's textfile collector"
        ),
    )


def _sources(value: str | tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return (DataSource(path=value),) if isinstance(value, str) else value
