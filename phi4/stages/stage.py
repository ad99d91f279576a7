"""Definition of a training stage: its loss, accepted source kinds, recipe rules and hooks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from phi4.config import Recipe
from phi4.config.gradient_form import check_gradient_form
from phi4.config.rules import Rule
from phi4.engine.objective import Objective
from phi4.errors import ConfigError
from phi4.train.hooks import HookFactory

STAGE_SECTIONS = ("dpo",)
"""Sections of a recipe that are only read by the stage of the same name."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training stage, independent of parallelism.

    Attributes:
        make_objective: makes the loss for a recipe.
        source_kinds: values of a source's `kind` that it can train on.
        rules: further rules for a recipe; see `phi4.config.rules`.
        hooks: hooks around the steps; see `phi4.train.hooks`.
    """

    make_objective: Callable[[Recipe], Objective]
    source_kinds: frozenset[str]
    rules: tuple[Rule, ...] = ()
    hooks: tuple[HookFactory, ...] = ()

    def violations(self, recipe: Recipe) -> Iterator[str]:
        """Return every violation of this stage's rules, one line each."""
        stage, accepted = recipe.run.stage, ", ".join(sorted(self.source_kinds))
        for source in (*recipe.data.sources, *recipe.data.held_out):
            if source.kind not in self.source_kinds:
                yield (
                    f"source {source.name!r} has kind={source.kind}, but run.stage={stage} accepts "
                    f"{accepted}; change the kind or the stage"
                )
        yield from _sections_without_effect(recipe)
        try:
            check_gradient_form(recipe.loss_head.form, self.make_objective(recipe).gradient)
        except ConfigError as error:
            yield str(error)
        for rule in self.rules:
            yield from rule(recipe)


def starts_from_weights(recipe: Recipe) -> Iterator[str]:
    """Rule of stages that do not train from random weights."""
    if recipe.run.init_from is None:
        yield (
            f"run.stage={recipe.run.stage} starts from trained weights, but run.init_from is not "
            f"set; set it to a checkpoint or a run, or use run.stage=pretrain"
        )


def _sections_without_effect(recipe: Recipe) -> Iterator[str]:
    if recipe.run.stage not in STAGE_SECTIONS and recipe.data.reference_cache is not None:
        yield (
            f"data.reference_cache={recipe.data.reference_cache} has no effect with run.stage="
            f"{recipe.run.stage}; remove it, or use run.stage=dpo"
        )
    for section in STAGE_SECTIONS:
        settings = getattr(recipe, section)
        for name, field in type(settings).model_fields.items():
            value = getattr(settings, name)
            if recipe.run.stage != section and value != field.default:
                yield (
                    f"{section}.{name}={value} has no effect with run.stage={recipe.run.stage}; "
                    f"remove it, or use run.stage={section}"
                )
