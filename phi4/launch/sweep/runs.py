"""Expand a sweep: every combination of axes, scales and seeds as a checked recipe.

All recipes are made and checked before the first run starts, so that a sweep cannot fail hours
later at an invalid combination.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4.config import Recipe, load_recipe, parse_recipe, violations
from phi4.errors import ConfigError
from phi4.launch.sweep.file import OWNED_KEYS, WEIGHTS, Axis, Change, SweepFile

ONLY_SCALE = "all"
"""Name of the scale in a sweep without scales."""
_MOST_SHOWN = 5
_HELD_OUT = "held_out_loss"

Tree = dict[str, Any]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: name of its directory under the sweep's.
        variant: row of the table that it belongs to.
        scale: column of the table.
        values: values of the axes, by name; for an axis with sets the set's name.
        recipe: its recipe.
    """

    name: str
    variant: str
    scale: str
    seed: int
    values: Mapping[str, Any]
    recipe: Recipe

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return Path(self.recipe.run.dir)

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        recipe = self.recipe
        rows = recipe.run.steps * recipe.batch.global_batch_size
        return rows * recipe.data.sequence_length


def runs_of(
    sweep: SweepFile,
    where: str,
    stage_violations: Callable[[Recipe], Sequence[str]] = lambda recipe: (),
) -> list[SweepRun]:
    """Return every run: scales outermost, then variants, then seeds.

    Args:
        sweep: the file's content.
        where: its path, for errors.
        stage_violations: returns violations of the rules of a recipe's stage.

    Raises:
        ConfigError: lists every combination that is not a valid recipe, and why.
    """
    base = _plain(load_recipe(sweep.recipe))
    runs: list[SweepRun] = []
    wrong: dict[str, str] = {}
    for scale, change in (sweep.scales or {ONLY_SCALE: {}}).items():
        for choice in _choices(sweep):
            for seed in sweep.seeds:
                name = run_name(choice, scale if sweep.scales else "", seed)
                try:
                    tree = _combined(sweep, base, change, choice)
                    recipe = _finished(sweep, tree, name, seed)
                    found = [*violations(recipe), *stage_violations(recipe)]
                    found += _metric_violations(sweep, recipe)
                    if found:
                        raise ConfigError("; ".join(found))
                except ConfigError as error:
                    wrong[name] = str(error).removeprefix(f"{name}: ")
                    continue
                values = {axis: option.value for axis, option in choice.items()}
                runs.append(SweepRun(name, variant_name(choice), scale, seed, values, recipe))
    if wrong:
        raise ConfigError(_complaint(where, wrong))
    _require_distinct(runs, where)
    _require_baseline(sweep, runs, where)
    return runs


@dataclass(frozen=True)
class Option:
    """One point of an axis.

    Attributes:
        label: part of a variant's name: `report`, or `learning_rate=0.003`.
        value: value of the key, or the set's name.
        change: changes of the recipe.
    """

    label: str
    value: Any
    change: Change


Choice = Mapping[str, Option]
"""By axis."""


def variant_name(choice: Choice) -> str:
    """Name of the table row: `report`, or `learning_rate=0.003, warmup=10`."""
    return ", ".join(option.label for option in choice.values())


def run_name(choice: Choice, scale: str, seed: int) -> str:
    """Name of the directory: `report.small.seed_1`."""
    parts = [variant_name(choice).replace(", ", "_"), *([scale] if scale else []), f"seed_{seed}"]
    return re.sub(r"[^A-Za-z0-9._=+-]", "-", ".".join(parts))


def _shown(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else str(value)


def _choices(sweep: SweepFile) -> Iterator[Choice]:
    """Return the variants, with the last axis varying fastest."""
    options = [_options(name, axis) for name, axis in sweep.axes.items()]
    combined = zip(*options, strict=True) if sweep.combine == "zip" else itertools.product(*options)
    for row in combined:
        yield dict(zip(sweep.axes, row, strict=True))


def _options(name: str, axis: Axis) -> list[Option]:
    if axis.key is None:
        return [Option(label, label, change) for label, change in axis.sets.items()]
    section, key = axis.key.split(".")
    return [
        Option(f"{name}={_shown(value)}", value, {section: {key: value}}) for value in axis.values
    ]


def _combined(sweep: SweepFile, base: Tree, scale: Change, choice: Choice) -> Tree:
    """Return the base recipe's tree with all changes; changes of axes override those of the
    scale."""
    tree = {section: dict(table) for section, table in base.items()}
    changed_by: dict[str, str] = {}
    changes = [("overrides", sweep.overrides), ("the scale", scale)]
    changes += [(f"axis {name}", option.change) for name, option in choice.items()]
    for who, change in changes:
        for section, table in change.items():
            if section == WEIGHTS:
                tree.setdefault("data", {})["sources"] = _weighed(base, table)
                keys = ["data.sources"]
            elif isinstance(table, dict):
                tree.setdefault(section, {}).update(table)
                keys = [f"{section}.{key}" for key in table]
            else:
                raise ConfigError(f"{who}: {section}={table!r} is not a section.key of a recipe")
            for key in keys:
                if key in OWNED_KEYS:
                    raise ConfigError(f"{who} sets {key}, which the sweep sets itself; remove it")
                before = changed_by.get(key, "")
                if before.startswith("axis") and who != before:
                    raise ConfigError(f"{before} and {who} both set {key}; remove one of them")
                changed_by[key] = who
    return tree


def _weighed(base: Tree, weights: Any) -> list[Tree]:
    """Return the base recipe's sources with these weights; sources with weight 0 or not named are
    dropped."""
    sources = base.get("data", {}).get("sources", [])
    names = [source["name"] for source in sources]
    if not isinstance(weights, dict):
        raise ConfigError(f"weights={weights!r} is not a table; write weights.NAME = 0.5")
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ConfigError(
            f"weights has unknown sources {', '.join(unknown)}; the base recipe has "
            f"{', '.join(names)}"
        )
    return [
        {**source, "weight": float(weights[source["name"]])}
        for source in sources
        if weights.get(source["name"])
    ]


def _finished(sweep: SweepFile, tree: Tree, name: str, seed: int) -> Recipe:
    """Return the recipe with the keys that the sweep sets."""
    own: dict[str, dict[str, object]] = {
        "run": {"dir": str(Path(sweep.directory) / "runs" / name), "name": name, "seed": seed},
        "tracking": {"sweep": sweep.name},
    }
    for section, table in own.items():
        tree[section] = {**tree.get(section, {}), **table}
    return parse_recipe(tree, where=name)


def _metric_violations(sweep: SweepFile, recipe: Recipe) -> Iterator[str]:
    names = [source.name for source in recipe.data.held_out]
    for metric in sweep.metrics:
        key, _, source = metric.partition("/")
        if key.startswith(_HELD_OUT) and not names:
            yield f"metric {metric} needs data.held_out, which is empty in the recipe"
        elif key == _HELD_OUT and source and source not in names:
            yield f"metric {metric}: unknown; data.held_out has {', '.join(names)}"


def _complaint(where: str, wrong: Mapping[str, str]) -> str:
    lines = [f"{name}: {why}" for name, why in wrong.items()]
    if len(lines) == 1:
        return f"sweep {where}: run {lines[0]}"
    shown = "\n".join(f"  - {line}" for line in lines[:_MOST_SHOWN])
    rest = len(lines) - _MOST_SHOWN
    more = f"\n  and {rest} more" if rest > 0 else ""
    return f"sweep {where}: {len(lines)} runs do not have a valid recipe:\n{shown}{more}"


def _require_distinct(runs: Sequence[SweepRun], where: str) -> None:
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"sweep {where}: {len(twice)} runs would share a directory, the first is {twice[0]}; "
            f"give every value once, and use set names that differ in letters and digits"
        )


def _require_baseline(sweep: SweepFile, runs: Sequence[SweepRun], where: str) -> None:
    variants = list(dict.fromkeys(run.variant for run in runs))
    if sweep.baseline is not None and sweep.baseline not in variants:
        raise ConfigError(
            f"sweep {where}: baseline={sweep.baseline!r} is not a variant; use one of "
            f"{'; '.join(variants)}"
        )
    unknown = sorted(set(sweep.maximize) - set(sweep.metrics))
    if unknown:
        raise ConfigError(
            f"sweep {where}: maximize has {', '.join(unknown)}, which are not in metrics; add them "
            f"there"
        )


def _plain(recipe: Recipe) -> Tree:
    return recipe.model_dump(mode="json", exclude_none=True)
