"""Write pairs of tokens as rows: in our format, with TRL's columns, or in codelion's pts format.

Our rows contain ids, and all pivots of a trajectory that can share one forward pass. The others
contain text; a pivot whose text does not encode to its ids is dropped, with the reason.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError
from phi4.pts.pairs.pivot_file import PivotItem
from phi4.pts.pairs.token_text import TokenText
from phi4.sampling.chat import read_chat_prompt

_NO_TEXT = "its text does not encode to its ids"
_LOST_SPACE = "a token ends with a space, which is lost before the end token that trl appends"


Written = tuple[list[PivotItem], dict[str, Any]]
"""A row, and its pivots."""


def id_rows(items: Sequence[PivotItem]) -> Iterator[Written]:
    """Yield rows of `ids` and `pivots` for `phi4 data pairs`.

    Two pivots at one position of a trajectory go to two rows.

    Args:
        items: pivots with both tokens, each once.
    """
    trajectories: dict[int, list[PivotItem]] = {}
    for item in items:
        trajectories.setdefault(id(item.trajectory), []).append(item)
    for found in trajectories.values():
        for _, row in groupby(_by_turn(found), key=lambda turned: turned[0]):
            together = [item for _, item in row]
            yield together, _id_row(together)


def _by_turn(items: Sequence[PivotItem]) -> list[tuple[int, PivotItem]]:
    """Yield pivots with the number of earlier ones at the same position, by this number."""
    earlier: Counter[int] = Counter()
    turns = []
    for item in items:
        turns.append((earlier[item.end], item))
        earlier[item.end] += 1
    return sorted(turns, key=lambda turned: (turned[0], turned[1].end))


def _id_row(items: Sequence[PivotItem]) -> dict[str, Any]:
    last = items[-1]
    return {
        "ids": last.prefix.tolist(),
        "pivots": [
            {
                "position": item.end - 1,
                "chosen_id": item.chosen,
                "rejected_id": item.rejected,
                "dp": item.dp,
            }
            for item in items
        ],
        "question": last.question,
        "task": last.task,
        "model": last.model,
    }


def trl_rows(
    items: Sequence[PivotItem], tokenizer: Tokenizer, left_out: Counter[str]
) -> Iterator[Written]:
    """Yield rows of `prompt`, `chosen` and `rejected` text.

    Args:
        items: pivots with both tokens, each once.
        tokenizer: tokenizer of the ids.
        left_out: counts of dropped pivots by reason.
    """
    form = TokenText(tokenizer)
    for item in items:
        ids = item.chosen, item.rejected
        chosen, rejected = (None if t is None else form.text(item.prefix, t) for t in ids)
        if chosen is None or rejected is None:
            left_out[_NO_TEXT] += 1
            continue
        if any(token != token.rstrip() for _, token in (chosen, rejected)):
            left_out[_LOST_SPACE] += 1
            continue
        about = {"question": item.question, "task": item.task, "dp": item.dp}
        yield [item], {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]} | about


def codelion_rows(
    items: Sequence[PivotItem], tokenizer: Tokenizer, left_out: Counter[str]
) -> Iterator[Written]:
    """Yield rows of codelion's pts, one per pivot, with the other token if there is one.

    Args:
        items: pivots, each once.
        tokenizer: tokenizer of the ids.
        left_out: counts of dropped pivots by reason.
    """
    form = TokenText(tokenizer)
    for item in items:
        found = None if item.token is None else form.text(item.prefix, item.token)
        if found is None:
            left_out[_NO_TEXT] += 1
            continue
        context, token = found
        other = item.rejected if item.dp > 0 else item.chosen
        named = "rejected_token" if item.dp > 0 else "chosen_token"
        other_text = None if other is None else form.text(item.prefix, other)
        row = {
            "model_id": item.model,
            "query": _query(item, tokenizer),
            "pivot_context": context,
            "pivot_token": token,
            "pivot_token_id": item.token,
            "prob_before": item.before,
            "prob_after": item.after,
            "prob_delta": item.dp,
            "is_positive": item.dp > 0,
            "task_type": item.task or "generic",
            "dataset_id": None,
            "dataset_item_id": item.question,
            named: other_text and other_text[1],
        }
        yield [item], row


def _query(item: PivotItem, tokenizer: Tokenizer) -> str:
    """Return the user's last turn; the entire prompt if it is not a conversation."""
    prompt = item.trajectory[: item.num_prompt].tolist()
    try:
        return read_chat_prompt(prompt, tokenizer)[-1].content
    except (DataError, IndexError):
        return tokenizer.decode(prompt)
