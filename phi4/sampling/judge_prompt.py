"""What a judge is shown: a template, with conversation and answers in it as quoted data.

The decision: whatever comes from a model or a user stands in the prompt as JSON strings in which
no special token can be spelled. So an answer cannot end its quotation, open a turn or speak to the
judge from outside of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi4.data.vocabulary.chat import Message
from phi4.errors import ConfigError

_OWN_TEMPLATE = Path(__file__).with_name("judge_prompt.j2")
_VARIABLES = "conversation, first and second"


@dataclass(frozen=True)
class Showing:
    """Two answers in the order in which a judge sees them.

    Attributes:
        conversation: that both answer.
        first: text of the answer that is shown first.
        second: of the other one.
    """

    conversation: tuple[Message, ...]
    first: str
    second: str


class JudgePrompt:
    """A template of a judge's prompt.

    Args:
        path: a jinja2 file with the variables `conversation`, `first` and `second`, each of which
            goes through the filter `quoted`; None for our own.

    Raises:
        ConfigError: it cannot be read, or it is no template.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or _OWN_TEMPLATE
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=False, finalize=_only_quoted
        )
        environment.filters["quoted"] = _quoted
        try:
            text = self._path.read_text(encoding="utf-8")
            self._template = environment.from_string(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--template={self._path} cannot be read: {error}") from None
        except TemplateError as error:
            raise self._not_a_template(error) from None

    def text(self, showing: Showing) -> str:
        """The prompt, one user's turn.

        Raises:
            ConfigError: the template asks for something else, or shows what is not quoted.
        """
        turns = [{"role": str(m.role), "content": m.content} for m in showing.conversation]
        try:
            return self._template.render(
                conversation=turns, first=showing.first, second=showing.second
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise self._not_a_template(error) from None

    def _not_a_template(self, error: Exception) -> ConfigError:
        said = " ".join(str(error).split())
        return ConfigError(
            f"--template={self._path} does not work: {said}; show {_VARIABLES}, each as "
            "{{ NAME | quoted }}"
        )


class _Quoted(str):
    """JSON that went through the filter."""


def _quoted(value: str | Sequence[dict[str, str]]) -> _Quoted:
    """JSON of a text or of turns; no special token's name can be read in it."""
    return _Quoted(json.dumps(value, ensure_ascii=False).replace("<|", "\\u003c|"))


def _only_quoted(value: object) -> object:
    """What an expression of the template puts into the prompt."""
    if not isinstance(value, _Quoted):
        raise ValueError("an expression shows a value that is not quoted")
    return value
