"""Define the types of the values that the keys of a configuration take."""

import datetime
import os
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fitune.optimizers.table import OPTIMIZERS
from fitune.units import GIB, parse_bytes, parse_seconds

MAX_DAYS = 36_500
MAX_MEMORY_GIB = 1_000_000


def _whole_number(value: object) -> object:
    """Turn a float without a fraction into an integer, because YAML reads 1e6 as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _memory_limit(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        limit = parse_bytes(value)
        if limit == 0:
            raise ValueError("a memory limit of 0 bytes holds nothing")
        if limit > MAX_MEMORY_GIB * GIB:
            raise ValueError(f"it must be at most {MAX_MEMORY_GIB:,} GiB")
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
    seconds = parse_seconds(value)
    if seconds == 0:
        raise ValueError("a run of 0 seconds does nothing")
    if seconds > MAX_DAYS * 86400:
        raise ValueError(f"it must be at most {MAX_DAYS:,} days: leave it out for no limit")
    return value


Auto = Literal["auto"]
ObjectiveName = Literal["sft", "dpo", "simpo", "orpo", "kto"]
#: What a sample is: one answer to imitate, a pair of answers, or an answer that is desirable or not.
SampleKind = Literal["answer", "pair", "labelled"]
PairLoss = Literal["sigmoid", "hinge", "ipo", "robust"]
#: Where the log-probabilities under the reference come from.
ReferenceKind = Literal["kept", "adapter_off", "frozen_copy"]
WholeNumber = BeforeValidator(_whole_number)
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
# A number above these limits is a slip of the hand: nothing can be done with it, and many would
# overflow the 64 bits of an array or the 32 bits of a weight long after the start.
Positive = Annotated[int, Field(strict=True, gt=0, le=10**9), WholeNumber]
Samples = Annotated[int, Field(strict=True, gt=0, le=10**6), WholeNumber]
Tokens = Annotated[int, Field(strict=True, gt=0, le=10**15), WholeNumber]
Rate = Annotated[Float, Field(ge=1e-15, le=1000)]
Scale = Annotated[Float, Field(ge=1e-6, le=1e9)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
ColumnName = Annotated[str, Field(min_length=1)]
#: the last part of a module's name
ModuleName = Annotated[str, Field(pattern=r"^\w+$")]
Date = Annotated[str, BeforeValidator(_date)]
Duration = Annotated[str, AfterValidator(_duration)]
MemoryLimit = Annotated[str | float, BeforeValidator(_memory_limit)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]

Method = Literal["full", "freeze", "lora", "qlora"]
AdapterInit = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"]
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
