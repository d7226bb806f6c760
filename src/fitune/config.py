"""A run's configuration: the schema. `read_config` turns YAML and overrides into a `RunConfig`.

The schema is the only place where a key, its default and its allowed values are written down; the JSON schema for
editors, the error messages and the documentation are made from it. A value that this version cannot carry out is not
in the schema, so no key is silently without effect.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]

Method = Literal["full", "lora"]
Precision = Literal["float32", "bfloat16", "autocast_bfloat16", "autocast_float16"]
Attention = Literal["flash", "efficient", "math", "eager"]
Recompute = Literal["off", "every_2", "every_4", "selective", "full"]
Loss = Literal["full", "chunked"]
OptimizerName = Literal["adamw", "adamw_foreach", "adamw_8bit", "adafactor", "sgd"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(Section):
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Fraction = 0.0
    targets: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear")


class ShapeConfig(Section):
    """The architecture of a bare weights file (minimind's .pth), which carries none; what is left out is read off
    the tensors' shapes where they tell it."""

    preset: str | None = Field(None, description="minimind-3, minimind-3-moe, minimind2 or minimind2-small")
    hidden_size: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None


class ModelConfig(Section):
    source: str = Field(description="preset name, directory, hub id, file.gguf or file.pth")
    tokenizer: str | None = Field(None, description="directory or hub id; the model's own when left out")
    init: Literal["pretrained", "random"] = "pretrained"
    method: Method = "full"
    lora: LoraConfig = LoraConfig()
    precision: Precision | Auto = "auto"
    attention: Attention | Auto = "auto"
    recompute: Recompute | Auto = "auto"
    shape: ShapeConfig = ShapeConfig()
    trust_remote_code: bool = False


class DataSource(Section):
    path: str = Field(description="file, directory or hub id; '#n' at its end samples n rows")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="how many times its rows are seen in an epoch")
    max_rows: Positive | None = None


class DataConfig(Section):
    train: str | tuple[DataSource, ...]
    eval: str | tuple[DataSource, ...] | None = Field(None, description="held-out data; else eval_fraction of train")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    max_length: Annotated[int, Field(ge=8)] = 2048
    template: str | None = Field(None, description="a Jinja chat template file; the tokenizer's when left out")
    mask: Literal["assistant", "all"] = "assistant"
    too_long: Literal["truncate", "drop"] = "truncate"
    max_rows: Positive | None = None
    packing: bool = True
    max_bad_fraction: Fraction = Field(0.01, description="stop when a larger share of the rows cannot be read")

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return _sources(self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...] | None:
        return None if self.eval is None else _sources(self.eval)


class BatchConfig(Section):
    effective: Positive | Auto = Field("auto", description="rows in an optimizer step, over all devices")
    micro: Positive | Auto = Field("auto", description="rows in one forward and backward")
    micro_tokens: Positive | Auto = Field("auto", description="tokens in one forward and backward")
    accumulation: Positive | Auto = Field("auto", description="micro-batches in an optimizer step")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro != "auto" and self.micro_tokens != "auto":
            raise ValueError("batch.micro (rows) and batch.micro_tokens (tokens) exclude each other: give one of them")
        if self.micro_tokens != "auto" and self.accumulation != "auto":
            raise ValueError(
                "batch.accumulation follows from the rows' lengths when batch.micro_tokens is given: drop it"
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
        return self

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
    name: OptimizerName = "adamw"
    lr: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="2e-5 for full fine-tuning, 2e-4 for LoRA")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 switches clipping off")
    warmup: Fraction = Field(0.03, description="share of the run's tokens over which the rate rises")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    final_lr_fraction: Fraction = Field(0.0, description="the rate at the end of the schedule, as a share of lr")


class MemoryConfig(Section):
    budget: str | Annotated[float, Field(gt=0, le=1)] = Field("auto", description="auto, 20GiB, or a share like 0.9")
    gpu: str | None = Field(None, description="a card of the catalogue to plan for; this machine's when left out")
    allocator: str = Field("", description="PYTORCH_ALLOC_CONF of the run and of its prediction")


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    tokens: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    eval_every: Positive | Auto = Field("auto", description="optimizer steps between evaluations; auto: ten in a run")
    save_every: Positive | Auto = Field("auto", description="optimizer steps between saves; auto: with each evaluation")
    stop_after: str | None = Field(None, description="save and stop after this time: 11h, 90m")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [key for key in ("epochs", "steps", "tokens") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"train.{' and train.'.join(given)} exclude each other: give one of them")
        return self


class EvalConfig(Section):
    micro: Positive | Auto = Field("auto", description="rows in one forward of the evaluation")
    max_rows: Positive = 2000


class OutputConfig(Section):
    output: Path = Path("runs")
    name: str | None = Field(
        None, description="the run's directory below output; made from model and data when left out"
    )


class RunConfig(Section):
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    loss: Loss | Auto = "auto"
    memory: MemoryConfig = MemoryConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: OutputConfig = OutputConfig()


def _sources(value: str | tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    return (DataSource(path=value),) if isinstance(value, str) else value
