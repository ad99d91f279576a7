"""Post-training data from the standard library: conversations, preferences, pivots.

A conversation asks for a function and gets it. The preference is planted: the chosen answer is the
function, the rejected one is the same lines in another order, so a model that orders lines better
than its reference does has found it. A pivot is the choice between the token that follows in the
function and the same token once more.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from phi4.data.rows.conversations import read_conversation
from phi4.data.vocabulary.chat import encode_chat
from phi4.data.vocabulary.tokenizer import Tokenizer

_VARIANTS = 4
"""Orders of lines that a function is rejected in."""
_LONGEST = 280
"""Characters of an answer that is preferred to another: both fit into a short row."""
_PIVOTS = 4
"""Of a trajectory, as far as it has tokens."""


def conversation_rows(exercises: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row with `messages` of each exercise."""
    for task, answer in map(_split, exercises):
        user, assistant = ("user", task), ("assistant", answer)
        turns = [{"role": role, "content": content} for role, content in (user, assistant)]
        yield {"messages": turns}


def preference_rows(exercises: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected` of the short exercises of several lines."""
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
    """Rows with `ids` and `pivots` of the exercises, up to the last pivot."""
    for row in conversation_rows(exercises):
        tokens = encode_chat(read_conversation(row), tokenizer)
        draw = random.Random(row["messages"][-1]["content"])
        # What follows position p is the token that a pivot chooses.
        places = [p for p, counts in enumerate(tokens.loss_mask[1:]) if counts]
        pivots = []
        for position in sorted(draw.sample(places, min(_PIVOTS, len(places)))):
            rejected, chosen = tokens.ids[position : position + 2]
            if chosen != rejected:
                pivots.append({"position": position, "chosen_id": chosen, "rejected_id": rejected})
        if pivots:
            yield {"ids": tokens.ids[: pivots[-1]["position"] + 1], "pivots": pivots}


def _split(exercise: str) -> tuple[str, str]:
    """Task, with the first paragraph of its description, and answer of an exercise."""
    task, _, answer = exercise.partition("\n\nAnswer:\n\n")
    return "\n\n".join(task.split("\n\n")[:2]), answer.strip()
