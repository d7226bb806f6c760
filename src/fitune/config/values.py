"""Define the types of the values that the keys of a configuration take."""

import datetime
import os
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fitune.optimizers.table import OPTIMIZERS
from fitune.units import parse_bytes, parse_seconds


def _whole_number(value: object) -> object:
    """Turn a float without a fraction into an integer, because YAML reads 1e6 as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _memory_limit(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        if parse_bytes(value) == 0:
            raise ValueError("a memory limit of 0 bytes holds nothing")
    elif isinstance(value, bool) or not (
        value == "auto" or (isinstance(value, int | float) and 0 < value <= 1)
    ):
        raise ValueError(f"{value} is neither a size like 20GiB nor a share above 0 and at most 1")
    return value


def _date(value: object) -> object:
    """Turn a date, which is what YAML reads 2026-01-31 as, into ISO 8601 text."""
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"'{value}' is no date: write it like 2026-01-31") from None


def _duration(value: str) -> str:
    if parse_seconds(value) == 0:
        raise ValueError("a run of 0 seconds does nothing")
    return value


Auto = Literal["auto"]
WholeNumber = BeforeValidator(_whole_number)
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, gt=0), WholeNumber]
PositiveFloat = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
ColumnName = Annotated[str, Field(min_length=1)]
Date = Annotated[str, BeforeValidator(_date)]
Duration = Annotated[str, AfterValidator(_duration)]
MemoryLimit = Annotated[str | float, BeforeValidator(_memory_limit)]
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
