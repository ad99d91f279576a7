"""The judge recipe: a small TOML file, every key with a default.

The report specifies neither margins nor the handling of ties; both are keys here.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from phi4.config.fields import NonNegative, Positive, Section
from phi4.errors import ConfigError
from phi4.sampling.judge import JudgeSampling


class AskSection(Section):
    """How a judge model is prompted."""

    max_tokens: Positive = 2048
    """Maximum tokens of a reply; a truncated reply is invalid."""
    temperature: float = Field(0.0, ge=0)
    retry_temperature: float = Field(1.0, gt=0)
    """Temperature of the attempts after an invalid reply."""
    retries: NonNegative = 2
    """Further attempts; after them the comparison is skipped and its replies go to the
    quarantine."""
    seed: NonNegative = 0
    """Seed of the first attempt; each later one adds 1."""
    max_prompt_tokens: NonNegative = 0
    """Maximum tokens of a prompt, longer ones are skipped; 0 means the judge's own limit."""

    def sampling(self) -> JudgeSampling:
        """For `ModelJudge`."""
        return JudgeSampling(**self.model_dump(exclude={"retries"}))


class PairsSection(Section):
    """Which comparisons are made, and when one becomes a pair."""

    combine: Literal["both", "mean"] = "both"
    """both: the difference reaches the margin in both orders. mean: on average over the two orders.
    Orders with different winners never make a pair."""
    overall_margin: float = Field(0.5, gt=0)
    """Minimum difference of the means of accuracy, style and detail, from 1 to 5."""
    accuracy_margin: float = Field(1.0, gt=0)
    """Minimum difference of accuracy."""
    max_per_prompt: NonNegative = 0
    """Maximum number of comparisons per prompt, chosen by the seed; 0 makes all."""
    same_model: bool = False
    """Whether answers of the same model are compared with each other too."""
    seed: NonNegative = 0
    """Seed of the choice of comparisons."""


class JudgeRecipe(Section):
    """The complete judge recipe."""

    ask: AskSection = AskSection()
    pairs: PairsSection = PairsSection()


SECTIONS = tuple(JudgeRecipe.model_fields)


def load_judge_recipe(path: Path | None, overrides: Sequence[str] = ()) -> JudgeRecipe:
    """Read a recipe file with `section.key=value` overrides; the defaults without a file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value has the wrong type.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(
                f"judge recipe {path} cannot be read: {error}; give a TOML file with the tables "
                "[ask] and [pairs]"
            ) from None
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
        where = f"judge recipe {path or 'overrides'}"
        lines = [f"{where}: {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(item: Mapping[str, Any]) -> str:
    """A rule that a recipe breaks."""
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        names = set(JudgeRecipe.model_fields)
        if len(item["loc"]) > 1:
            section = JudgeRecipe.model_fields[str(item["loc"][0])].annotation
            assert isinstance(section, type) and issubclass(section, Section)
            names = set(section.model_fields)
        return f"unknown key {key}; expected one of {', '.join(sorted(names))}"
    return f"{key}={item['input']!r}: {item['msg'].lower()}"


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
