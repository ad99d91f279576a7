"""Post-training data from the standard library: conversations, preferences, pivots.

A conversation asks for a function and gets it. The preference is synthetic: the chosen answer is
the function, the rejected one has the same lines in another order, so a model that has learned the
preference orders lines better than its reference does. A pivot is the choice between the token that
follows in the function and a repetition of the previous token.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from phi4.data.rows.conversations import read_conversation
from phi4.data.vocabulary.chat import encode_chat
from phi4.data.vocabulary.tokenizer import Tokenizer

_VARIANTS = 4
"""Number of line orders in which a function is rejected."""
_LONGEST = 280
"""Maximum characters of an answer in a pair: both answers must fit into a short row."""
_PIVOTS = 4
"""Pivots per trajectory, fewer if it is short."""


def conversation_rows(exercises: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Make a row with `messages` from each exercise."""
    for task, answer in map(_split, exercises):
        user, assistant = ("user", task), ("assistant", answer)
        turns = [{"role": role, "content": content} for role, content in (user, assistant)]
        yield {"messages": turns}


def preference_rows(exercises: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Make rows with `prompt`, `chosen` and `rejected` from the short exercises of several
    lines."""
    for task, answer in map(_split, exercises):
        if len(answer) > _LONGEST:
            continue
        lines = answer.splitlines()
        orders = {answer}
        for variant in range(_VARIANTS):
            shuffled = lines[:]
            random.Random(f"{variant}:{answer}").shuffle(shuffled)
            rejected = "\n".join(shuffled)
            if rejected not in orders:
                orders.add(rejected)
                yield {"prompt": task, "chosen": answer, "rejected": rejected}


def pivot_rows(exercises: Sequence[str], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Make rows with `ids` and `pivots` from the exercises, up to the last pivot."""
    for row in conversation_rows(exercises):
        tokens = encode_chat(read_conversation(row), tokenizer)
        draw = random.Random(row["messages"][-1]["content"])
        # The pivot at position p chooses the token that follows it.
        places = [p for p, counts in enumerate(tokens.loss_mask[1:]) if counts]
        pivots = []
        for position in sorted(draw.sample(places, min(_PIVOTS, len(places)))):
            rejected, chosen = tokens.ids[position : position + 2]
            if chosen != rejected:
                pivots.append({"position": position, "chosen_id": chosen, "rejected_id": rejected})
        if pivots:
            yield {"ids": tokens.ids[: pivots[-1]["position"] + 1], "pivots": pivots}


def _split(exercise: str) -> tuple[str, str]:
    """Split an exercise into the task, with the first paragraph of its description, and the
    answer."""
    task, _, answer = exercise.partition("\n\nAnswer:\n\n")
    return "\n\n".join(task.split("\n\n")[:2]), answer.strip()
