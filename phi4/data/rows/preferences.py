"""Parse preferences of rows: two answers to one prompt, as messages.

The prompt is read once in any form: if the answers repeat it, they are complete conversations,
whose common beginning is the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi4.data.rows.conversations import check_answers
from phi4.data.rows.messages import (
    column_names,
    end_of_prompt,
    read_side,
    refuse_tools,
    shown,
    spoken,
)
from phi4.data.vocabulary.chat import Conversation, Message, Role
from phi4.errors import DataError

Messages = tuple[Message, ...]

PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected", "context", "completions")
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferencePair:
    """A context and two continuations."""

    prompt: Messages
    chosen: Messages
    rejected: Messages

    def conversations(self) -> tuple[Conversation, Conversation]:
        """The chosen and the rejected conversation; the loss covers both from the end of the prompt
        on."""
        start = len(self.prompt)
        chosen = Conversation(self.prompt + self.chosen, start)
        return chosen, Conversation(self.prompt + self.rejected, start)


def read_preference(row: Mapping[str, object]) -> PreferencePair:
    """Parse the pair of a preference row with the column names of TRL or NeMo-RL.

    Args:
        row: `prompt`, `chosen` and `rejected`, each a string or a list of messages. Without
            `prompt`, two lists of messages share it as their common beginning; with it, lists that
            repeat the prompt do. Or `context` and two `completions`, each with `rank` and
            `completion`, the lower rank preferred.

    Raises:
        DataError: the columns are missing or malformed, a role or the value of a flag is unknown,
            there is no prompt, an answer does not begin and end with an assistant turn, is empty or
            has no turn in the loss, or the two are equal.
    """
    refuse_tools(row)
    if "completions" in row:
        row = _from_ranked(row)
    if any(name not in row for name in _SIDES):
        raise DataError(
            f"preference row has columns {column_names(row)}; expected `prompt`, `chosen`, "
            "`rejected`"
        )
    chosen, rejected = (read_side(row[name], name, Role.ASSISTANT) for name in _SIDES)
    if "prompt" in row:
        given = read_side(row["prompt"], "prompt", Role.USER)
        prompt, chosen, rejected = _split_given(given, chosen, rejected)
    else:
        prompt, chosen, rejected = _split_common(chosen, rejected)
    if spoken(chosen) == spoken(rejected):
        raise DataError("chosen and rejected are equal; remove the row")
    if not prompt:
        raise DataError("preference row has no prompt; add `prompt` or common first messages")
    pair = PreferencePair(prompt, chosen, rejected)
    _check_sides(pair)
    return pair


def _check_sides(pair: PreferencePair) -> None:
    for name, answer in zip(_SIDES, (pair.chosen, pair.rejected), strict=True):
        if not answer or answer[-1].role is not Role.ASSISTANT:
            raise DataError(f"{name} must end with an assistant turn; add it")
        if answer[0].role is not Role.ASSISTANT:
            raise DataError(
                f"{name} begins with a {answer[0].role} turn after the prompt; both answers must "
                "be to the same prompt"
            )
    for name, conversation in zip(_SIDES, pair.conversations(), strict=True):
        if not conversation.has_loss:
            raise DataError(
                f"flags exclude all turns of the answer {name} from the loss; remove the row"
            )
        check_answers(conversation, name)


def _split_given(given: Messages, chosen: Messages, rejected: Messages) -> tuple:
    """Split a row with a prompt, which one or both answers may repeat, into prompt and answers."""
    ends = [end_of_prompt(given, side) for side in (chosen, rejected)]
    if not any(ends):
        return given, chosen, rejected
    whole = chosen[: ends[0]] or rejected[: ends[1]]
    sides = zip((chosen, rejected), ends, strict=True)
    return _split_common(*(side if end else whole + side for side, end in sides))


def _split_common(first: Messages, second: Messages) -> tuple:
    pairs = enumerate(zip(spoken(first), spoken(second), strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    return first[:same], first[same:], second[same:]


def _from_ranked(row: Mapping[str, object]) -> dict[str, object]:
    """Convert a row of NeMo-RL's format to TRL's names."""
    if any(name in row for name in _SIDES) or "context" not in row:
        raise DataError(
            f"preference row has columns {column_names(row)}; expected `context` and `completions`"
        )
    ranked = row["completions"]
    if not isinstance(ranked, Sequence) or isinstance(ranked, str) or len(ranked) != 2:
        count = len(ranked) if isinstance(ranked, Sequence) else shown(ranked)
        raise DataError(f"preference row has {count} completions; expected exactly two")
    if not all(isinstance(one, Mapping) and type(one.get("rank")) is int for one in ranked):
        raise DataError(
            f'completions are {shown(ranked)}; expected {{"rank": 0, "completion": [...]}}'
        )
    best, worst = sorted(ranked, key=lambda one: one["rank"])
    if best["rank"] == worst["rank"]:
        raise DataError(
            f"both completions have rank {best['rank']}; expected two ranks, the lower preferred"
        )
    sides = zip(_SIDES, (best, worst), strict=True)
    answers = {name: one.get("completion") for name, one in sides}
    return {"prompt": row["context"], **answers}
