"""The recipe: one tree of frozen models, its cross-checks, and how it is read and compared."""

from phi4.config.data_schema import DataConfig, SourceConfig, TokenizerConfig
from phi4.config.load import (
    changed_keys,
    dump_toml,
    identity_hash,
    load_recipe,
    parse_recipe,
    recipe_from_toml,
    with_overrides,
)
from phi4.config.rules import check, violations
from phi4.config.schema import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    KernelsConfig,
    LossHeadConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    Recipe,
    RecomputeConfig,
    RunConfig,
    TrackingConfig,
    key_kinds,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "KernelsConfig",
    "LossHeadConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "Recipe",
    "RecomputeConfig",
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
