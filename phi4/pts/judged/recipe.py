"""How answers are judged: a small TOML recipe, every key with a default of ours.

The report gives neither margins nor what becomes of ties; both are keys here.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from phi4.config.fields import NonNegative, Positive, Section
from phi4.errors import ConfigError
from phi4.sampling.judge import JudgeSampling


class AskSection(Section):
    """How a judge that is a model is asked."""

    max_tokens: Positive = 2048
    """Of a reply; one that is cut off is no opinion."""
    temperature: float = Field(0.0, ge=0)
    retry_temperature: float = Field(1.0, gt=0)
    """Of the attempts after a reply that was no opinion."""
    retries: NonNegative = 2
    """Further attempts; then the comparison is left out and its replies are in quarantine."""
    seed: NonNegative = 0
    """Of the first attempt; each later one adds 1."""
    max_prompt_tokens: NonNegative = 0
    """A longer prompt is left out; 0 leaves that to the judge's own limit."""

    def sampling(self) -> JudgeSampling:
        """For `ModelJudge`."""
        return JudgeSampling(**self.model_dump(exclude={"retries"}))


class PairsSection(Section):
    """Which comparisons are made, and when one becomes a pair."""

    combine: Literal["both", "mean"] = "both"
    """both: the difference reaches the margin in both orders. mean: on average over the two orders.
    Orders that name different winners give no pair in either case."""
    overall_margin: float = Field(0.5, gt=0)
    """Least difference of the means of accuracy, style and detail, from 1 to 5."""
    accuracy_margin: float = Field(1.0, gt=0)
    """Least difference of accuracy."""
    max_per_prompt: NonNegative = 0
    """Comparisons of a prompt at most, drawn by the seed; 0 makes all."""
    same_model: bool = False
    """Whether answers of one model are compared with each other too."""
    seed: NonNegative = 0
    """Of the comparisons that are drawn."""


class JudgeRecipe(Section):
    """All of it."""

    ask: AskSection = AskSection()
    pairs: PairsSection = PairsSection()


SECTIONS = tuple(JudgeRecipe.model_fields)


def load_judge_recipe(path: Path | None, overrides: Sequence[str] = ()) -> JudgeRecipe:
    """The recipe of a file with `section.key=value` overrides; the defaults without a file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value has the wrong type.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, name = key.partition(".")
        table = tree.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: [{section}] is not a table in the recipe")
        table[name] = _value(text)
    try:
        return JudgeRecipe.model_validate(tree)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"judge recipe {path or 'overrides'}: {said}") from None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
