"""The recipe's schema: every key, its unit, and whether it may change when a run resumes.

Each key is declared `identity` (part of the model's identity; a resume with another value is
refused), `schedule` (may change on resume with `--change`, recorded in the run's history with the
step) or `free` (layout, kernels, files: may change at any restart). Cross-checks between keys are
in `rules.py`.
"""

from pydantic.fields import FieldInfo

from phi4.config.data_schema import DataConfig, SourceConfig, TokenizerConfig
from phi4.config.execution_schema import (
    KernelsConfig,
    LossHeadConfig,
    ParallelConfig,
    RecomputeConfig,
)
from phi4.config.fields import Kind, Section
from phi4.config.model_schema import ModelConfig, PrecisionConfig
from phi4.config.run_schema import CheckpointConfig, ReliabilityConfig, RunConfig, TrackingConfig
from phi4.config.training_schema import BatchConfig, DpoConfig, EvaluationConfig, OptimConfig

_KINDS: tuple[Kind, ...] = ("identity", "schedule", "free")


class Recipe(Section):
    """The complete definition of a training run."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    loss_head: LossHeadConfig = LossHeadConfig()
    dpo: DpoConfig = DpoConfig()
    kernels: KernelsConfig = KernelsConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()


def section_keys(section: str) -> dict[str, FieldInfo]:
    """The keys of a section of the recipe, by name."""
    annotation = Recipe.model_fields[section].annotation
    assert isinstance(annotation, type) and issubclass(annotation, Section), section
    return annotation.model_fields


def key_kinds() -> dict[str, Kind]:
    """Return the kind of every dotted key of the recipe, for example `model.num_layers:
    identity`."""
    kinds: dict[str, Kind] = {}
    for section in Recipe.model_fields:
        for name, info in section_keys(section).items():
            kinds[f"{section}.{name}"] = _kind_of(info, f"{section}.{name}")
    return kinds


def source_key_kinds() -> dict[str, Kind]:
    """Return the kind of every key of a source; if only free keys change, the data stays the
    same."""
    fields = SourceConfig.model_fields
    return {name: _kind_of(info, f"source.{name}") for name, info in fields.items()}


def _kind_of(info: FieldInfo, name: str) -> Kind:
    extra = info.json_schema_extra
    assert isinstance(extra, dict) and extra.get("kind") in _KINDS, name
    return next(kind for kind in _KINDS if kind == extra["kind"])
