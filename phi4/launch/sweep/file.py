"""The sweep file: a base recipe, and what varies over its runs.

A change is a part of a recipe, written as in one: `optim.learning_rate = 3e-3`. One key more is
allowed, `weights`: the named sources of the base recipe with these weights, the others left out.
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
# What an axis may set is the recipe's to check.
Values = Annotated[tuple[Any, ...], Strict(False)]

WEIGHTS = "weights"
OWNED_KEYS = ("run.dir", "run.name", "run.seed", "tracking.sweep")
"""Keys that the sweep sets for every run."""


class Axis(Section):
    """What varies: a key with its values, or named changes."""

    key: str | None = None
    """Dotted key of the recipe, as optim.learning_rate."""
    values: Values = ()
    sets: dict[Name, Change] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_one_form(self) -> "Axis":
        if bool(self.sets) == (self.key is not None):
            raise ValueError("has key and values, or sets: one of the two forms")
        if self.key is None:
            if self.values:
                raise ValueError("values need the key that they are of")
            return self
        known = key_kinds()
        if self.key not in known:
            raise ValueError(f"unknown key {self.key!r}{nearest(self.key, known)}")
        if not self.values:
            raise ValueError(f"values of {self.key} are missing")
        return self


class SweepFile(Section):
    """What `phi4 sweep` reads."""

    name: Name
    """Of the parent run in MLflow, whose children the runs are (tracking.sweep)."""
    recipe: str
    """The base recipe, from the directory that the command runs in."""
    directory: str
    """Takes runs, logs and pictures."""
    seeds: Seeds
    """Every combination runs once with each (run.seed)."""
    axes: dict[Name, Axis] = Field(min_length=1)
    """What makes a variant. Variants are the rows of the table."""
    combine: Literal["grid", "zip"] = "grid"
    """grid: every value of an axis with every value of the others. zip: the first of each, ..."""
    scales: dict[Name, Change] = Field(default_factory=dict)
    """Sizes of model or token budget that every variant runs at; without any, the base's."""
    overrides: Change = Field(default_factory=dict)
    """Of all runs."""
    metrics: Names = ("held_out_loss",)
    """Of a run: the last value of a key of metrics.jsonl, as held_out_loss/SOURCE; or `spikes`,
    its skipped updates and roll backs; or `loss_rise`, the most that the training loss rose above
    its lowest value before. The first one is ranked, fitted and drawn."""
    maximize: Names = ()
    """Those metrics of which more is better."""
    baseline: str | None = None
    """The variant that the others are compared with; None is the first."""
    analysis: Analysis = "table"
    """Of `phi4 sweep table` where it names none."""
    predict_tokens: Positive | None = None
    """Token budget that analysis learning_rate predicts the best rate of."""
    parallel_runs: Positive = 1
    """Runs at a time on this machine."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "SweepFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has one twice")
        if not self.metrics:
            raise ValueError('metrics: name one, as ["held_out_loss"]')
        lengths = {name: len(axis.values or axis.sets) for name, axis in self.axes.items()}
        if self.combine == "zip" and len(set(lengths.values())) > 1:
            raise ValueError(f'combine="zip" needs axes of one length, got {lengths}; use "grid"')
        keys = [axis.key for axis in self.axes.values() if axis.key]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two axes vary {key}; make them one")
            if key in OWNED_KEYS:
                raise ValueError(f"{key} is set by the sweep (seeds, directory); vary another key")
        return self


def load_sweep(path: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: it is missing, no TOML, or a key is unknown or wrong; all of them at once.
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
