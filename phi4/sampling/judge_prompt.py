"""The judge's prompt: a template with the conversation and answers as quoted data.

All text from a model or a user is inserted as JSON strings that cannot contain a special token. An
answer thus cannot end its quotation, open a turn or address the judge outside it.
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
        conversation: conversation before both answers.
        first: text of the answer shown first.
        second: text of the other one.
    """

    conversation: tuple[Message, ...]
    first: str
    second: str


class JudgePrompt:
    """A template of a judge's prompt.

    Args:
        path: a jinja2 file with the variables `conversation`, `first` and `second`, each passed
            through the filter `quoted`; None for our own.

    Raises:
        ConfigError: it cannot be read, or it is not a template.
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
            raise ConfigError(
                f"--template={self._path} cannot be read: {error}; give a UTF-8 file with a "
                f"template"
            ) from None
        except TemplateError as error:
            raise self._not_a_template(error) from None

    def text(self, showing: Showing) -> str:
        """Return the prompt, one user turn.

        Raises:
            ConfigError: the template uses another variable, or shows an unquoted value.
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
    """JSON that has passed through the filter."""


def _quoted(value: str | Sequence[dict[str, str]]) -> _Quoted:
    """Return JSON of a text or of turns, without names of special tokens."""
    return _Quoted(json.dumps(value, ensure_ascii=False).replace("<|", "\\u003c|"))


def _only_quoted(value: object) -> object:
    """Return the value that an expression of the template inserts into the prompt."""
    if not isinstance(value, _Quoted):
        raise ValueError("an expression shows a value that is not quoted")
    return value
