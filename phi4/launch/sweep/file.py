"""The sweep file: a base recipe, and the values that vary over its runs.

A change is written as in a recipe: `optim.learning_rate = 3e-3`. One additional key is allowed,
`weights`: the named sources of the base recipe with these weights, without the others.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationError, model_validator

from phi4.config.fields import Positive, Section
from phi4.config.load import read_toml
from phi4.config.overrides import nearest
from phi4.config.schema import key_kinds
from phi4.errors import ConfigError

Analysis = Literal["table", "ranks", "learning_rate"]
Change = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Names = Annotated[tuple[str, ...], Strict(False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
# The values of an axis are validated by the recipe.
Values = Annotated[tuple[Any, ...], Strict(False)]

WEIGHTS = "weights"
OWNED_KEYS = ("run.dir", "run.name", "run.seed", "tracking.sweep")
"""Keys that the sweep sets for every run."""


class Axis(Section):
    """An axis of the sweep: a key with its values, or named sets of changes."""

    key: str | None = None
    """Dotted key of the recipe, such as optim.learning_rate."""
    values: Values = ()
    sets: dict[Name, Change] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_one_form(self) -> "Axis":
        if bool(self.sets) == (self.key is not None):
            raise ValueError("needs either key and values, or sets")
        if self.key is None:
            if self.values:
                raise ValueError("values need a key")
            return self
        known = key_kinds()
        if self.key not in known:
            raise ValueError(f"unknown key {self.key!r}{nearest(self.key, known)}")
        if not self.values:
            raise ValueError(f"values of {self.key} are missing")
        return self


class SweepFile(Section):
    """The content of a sweep file."""

    name: Name
    """Name of the parent run in MLflow, whose children are the runs (tracking.sweep)."""
    recipe: str
    """Path of the base recipe, relative to the working directory of the command."""
    directory: str
    """Directory for runs, logs and plots."""
    seeds: Seeds
    """Seeds; every combination runs once with each (run.seed)."""
    axes: dict[Name, Axis] = Field(min_length=1)
    """Axes that make up a variant. Variants are the rows of the table."""
    combine: Literal["grid", "zip"] = "grid"
    """grid: every value of an axis with every value of the others. zip: the first of each, the
    second of each, ..."""
    scales: dict[Name, Change] = Field(default_factory=dict)
    """Model sizes or token budgets that every variant runs at; defaults to the base recipe's."""
    overrides: Change = Field(default_factory=dict)
    """Changes for all runs."""
    metrics: Names = ("held_out_loss",)
    """Metrics of a run: the last value of a key of metrics.jsonl, such as held_out_loss/SOURCE; or
    `spikes`, the number of skipped updates and rollbacks; or `loss_rise`, the largest rise of the
    training loss above its previous minimum. The first metric is ranked, fitted and plotted."""
    maximize: Names = ()
    """Metrics for which higher is better."""
    baseline: str | None = None
    """The variant that the others are compared with; defaults to the first."""
    analysis: Analysis = "table"
    """Default of `phi4 sweep table`."""
    predict_tokens: Positive | None = None
    """Token budget for which analysis learning_rate predicts the best rate."""
    parallel_runs: Positive = 1
    """Number of concurrent runs on this machine."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "SweepFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} contains a seed twice")
        if not self.metrics:
            raise ValueError('metrics is empty; give at least one, such as ["held_out_loss"]')
        lengths = {name: len(axis.values or axis.sets) for name, axis in self.axes.items()}
        if self.combine == "zip" and len(set(lengths.values())) > 1:
            raise ValueError(f'combine="zip" needs axes of equal length, got {lengths}; use "grid"')
        keys = [axis.key for axis in self.axes.values() if axis.key]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two axes vary {key}; merge them")
            if key in OWNED_KEYS:
                raise ValueError(f"{key} is set by the sweep (seeds, directory); vary another key")
        return self


def load_sweep(path: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: the file is missing or not TOML, or keys are unknown or wrong; all of them at
            once.
    """
    tree = read_toml(path, "sweep")
    try:
        return SweepFile.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"sweep {path}: " + "; ".join(lines)) from None


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, [*SweepFile.model_fields, *Axis.model_fields])}"
    if item["type"] == "missing":
        return f"{key} is required"
    text = item["msg"].removeprefix("Value error, ")
    shown = f", got {item['input']!r}" if isinstance(item["input"], str | int | float) else ""
    return f"{key}: {text}{shown}" if key else text
