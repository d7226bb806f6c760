"""Define, read, check and write a run's configuration.

`schema` defines the whole configuration, `sections` the keys of its sections and `values` the types
of their values. `read` reads and checks a configuration, `write` turns it back into text, and
`importers` translates the configurations of other trainers.
"""

from fitune.config.read import ResolvedConfig, read_config
from fitune.config.schema import RunConfig
from fitune.config.sections import (
    BatchConfig,
    DataConfig,
    DataSource,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PreferenceConfig,
    ShapeConfig,
    TrainConfig,
)
from fitune.config.trained_parts import FreezeConfig, LoraConfig
from fitune.config.values import (
    Attention,
    Auto,
    BatchMode,
    Loss,
    Method,
    ObjectiveName,
    Precision,
    Recompute,
    ReferenceKind,
    SampleKind,
    Scaling,
)
from fitune.config.write import config_hash, format_config, json_schema
from fitune.recorder.routing import Routing

__all__ = [
    "Attention",
    "Auto",
    "BatchConfig",
    "BatchMode",
    "DataConfig",
    "DataSource",
    "EvalConfig",
    "FreezeConfig",
    "LoraConfig",
    "Loss",
    "MemoryConfig",
    "Method",
    "ModelConfig",
    "ObjectiveName",
    "OptimConfig",
    "OutputConfig",
    "Precision",
    "PreferenceConfig",
    "Recompute",
    "ReferenceKind",
    "ResolvedConfig",
    "Routing",
    "RunConfig",
    "SampleKind",
    "Scaling",
    "ShapeConfig",
    "TrainConfig",
    "config_hash",
    "format_config",
    "json_schema",
    "read_config",
]
