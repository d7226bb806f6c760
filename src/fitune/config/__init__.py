"""A run's configuration: what may be written (`schema`), how it is read and checked (`read`), its text (`write`)."""

from fitune.config.read import ResolvedConfig, read_config
from fitune.config.schema import (
    BatchConfig,
    DataConfig,
    DataSource,
    EvalConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    RunConfig,
    ShapeConfig,
    TrainConfig,
)
from fitune.config.write import config_hash, format_config, json_schema

__all__ = [
    "BatchConfig",
    "DataConfig",
    "DataSource",
    "EvalConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "ResolvedConfig",
    "RunConfig",
    "ShapeConfig",
    "TrainConfig",
    "config_hash",
    "format_config",
    "json_schema",
    "read_config",
]
