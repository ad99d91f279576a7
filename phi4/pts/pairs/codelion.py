"""Read pivots of codelion's pts, whose files contain text.

A row is used only if its text encodes to the same ids on both sides of the pivot. Otherwise the
measured token is not a token of our vocabulary, and the row is dropped with that reason.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.pts.json_rows import read_json_rows
from phi4.pts.pairs.pivot_file import PivotItem, Trajectories
from phi4.pts.pairs.token_text import TokenText


@dataclass(frozen=True)
class _TextPivot:
    """A row as text."""

    context: str
    chosen: str | None
    rejected: str | None
    dp: float


def read_codelion(path: Path, tokenizer: Tokenizer, left_out: Counter[str]) -> Iterator[PivotItem]:
    """Yield the pivots of a file that can be expressed in ids.

    Args:
        path: rows of pivotal tokens in either version, or the pairs of its DPO export.
        tokenizer: tokenizer of the model that was searched.
        left_out: counts of dropped rows by reason.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    form, trajectories = TokenText(tokenizer), Trajectories()
    for _, row in read_json_rows(path):
        found = _text_pivot(row)
        if isinstance(found, str):
            left_out[found] += 1
            continue
        prefix = form.ids(found.context)
        texts = (found.chosen, found.rejected)
        chosen, rejected = (_token(form, prefix, found.context, text) for text in texts)
        if isinstance(chosen, str) or isinstance(rejected, str):
            left_out[chosen if isinstance(chosen, str) else str(rejected)] += 1
            continue
        details = _details(row)
        yield PivotItem(
            question=str(details.get("dataset_item_id") or details.get("query") or ""),
            task=str(details.get("task_type") or ""),
            model=str(details.get("model_id") or ""),
            trajectory=trajectories.of(prefix),
            num_prompt=len(prefix),
            end=len(prefix),
            chosen=chosen,
            rejected=rejected,
            dp=found.dp,
            before=_number(details.get("prob_before")),
            after=_number(details.get("prob_after")),
        )


def _details(row: Mapping[str, object]) -> dict[str, object]:
    """Return the columns of a row, completed by those of its `metadata`."""
    more = row.get("metadata")
    return (dict(more) if isinstance(more, Mapping) else {}) | dict(row)


def _text_pivot(row: Mapping[str, object]) -> _TextPivot | str:
    """Return the pivot of a row, or why there is none."""
    details = _details(row)
    dp = _number(details.get("prob_delta"))
    if row.get("event_type", "pivotal_token") != "pivotal_token":
        return "no pivotal token: another kind of event"
    if not dp:
        return "no prob_delta"
    if "chosen" in row and "rejected" in row:
        context, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    else:
        context = details.get("pivot_context") or row.get("context")
        token = details.get("pivot_token", row.get("label"))
        other = details.get("rejected_token" if dp > 0 else "chosen_token")
        chosen, rejected = (token, other) if dp > 0 else (other, token)
    if not isinstance(context, str) or not context:
        return "no context"
    if not (_is_token(chosen) and _is_token(rejected)):
        return "a token that is not text"
    if (chosen if dp > 0 else rejected) is None:
        return "no token"
    return _TextPivot(context, chosen, rejected, dp)


def _is_token(value: object) -> TypeGuard[str | None]:
    return value is None or (isinstance(value, str) and value != "")


def _token(form: TokenText, prefix: list[int], context: str, text: str | None) -> int | str | None:
    """Return the id of a token's text after a context; None without one, or why it has none."""
    if text is None:
        return None
    whole = form.ids(context + text)
    if whole[: len(prefix)] != prefix:
        return "the context encodes differently with the token after it"
    return whole[-1] if len(whole) == len(prefix) + 1 else "not one token of this vocabulary"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
