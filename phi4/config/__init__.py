"""The recipe: one tree of frozen pydantic models, its cross-checks, and code to read and compare
it."""

from phi4.config.data_schema import DataConfig, SourceConfig, TokenizerConfig
from phi4.config.execution_schema import (
    KernelsConfig,
    LossHeadConfig,
    ParallelConfig,
    RecomputeConfig,
)
from phi4.config.load import (
    changed_keys,
    dump_toml,
    identity_hash,
    load_recipe,
    parse_recipe,
    recipe_from_toml,
    with_overrides,
)
from phi4.config.model_schema import ModelConfig, PrecisionConfig
from phi4.config.rules import check, violations
from phi4.config.run_schema import CheckpointConfig, ReliabilityConfig, RunConfig, TrackingConfig
from phi4.config.schema import Recipe, key_kinds
from phi4.config.training_schema import BatchConfig, DpoConfig, EvaluationConfig, OptimConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DpoConfig",
    "EvaluationConfig",
    "KernelsConfig",
    "LossHeadConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "Recipe",
    "RecomputeConfig",
    "ReliabilityConfig",
    "RunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "changed_keys",
    "check",
    "dump_toml",
    "identity_hash",
    "key_kinds",
    "load_recipe",
    "parse_recipe",
    "recipe_from_toml",
    "violations",
    "with_overrides",
]
