"""A run's configuration: what may be written (`schema`), how it is read and checked (`read`), its text (`write`)."""

from fitune.config.read import ResolvedConfig, read_config
from fitune.config.schema import (
    Attention,
    Auto,
    BatchConfig,
    DataConfig,
    DataSource,
    EvalConfig,
    LoraConfig,
    Loss,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    Precision,
    Recompute,
    RunConfig,
    ShapeConfig,
    TrainConfig,
)
from fitune.config.write import config_hash, format_config, json_schema

__all__ = [
    "Attention",
    "Auto",
    "BatchConfig",
    "DataConfig",
    "DataSource",
    "EvalConfig",
    "LoraConfig",
    "Loss",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "Precision",
    "Recompute",
    "ResolvedConfig",
    "RunConfig",
    "ShapeConfig",
    "TrainConfig",
    "config_hash",
    "format_config",
    "json_schema",
    "read_config",
]
