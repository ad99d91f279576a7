"""The plan of a tokenization: everything that its output depends on, and how two plans differ."""

from collections.abc import Set

import msgspec
import numpy as np

from phi4.data.files.input_rows import Part, list_parts
from phi4.data.files.inputs import FoundInputs, InputFile
from phi4.data.tokenize.documents import TEXT_COLUMN
from phi4.data.vocabulary.tokenizer import TokenizerFacts

WITHOUT_LOSS = 1 << 30
"""Bit of a run's ids that excludes the token from the loss; no vocabulary uses it."""
RUN_TOKENS = 1 << 24
KEY_TYPE = np.dtype([("key", "<u8"), ("length", "<i4")])


class TokenizePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a tokenization; stored as plan.json in its work directory."""

    format_version: int = 2
    parts: tuple[Part, ...]
    tokenizer: TokenizerFacts
    text_column: str | None
    seed: int | None

    def files(self) -> dict[str, InputFile]:
        """Return the inputs by path."""
        return {file.path: file for part in self.parts for file in part.files}


def make_plan(
    inputs: FoundInputs,
    tokenizer: TokenizerFacts,
    *,
    text_column: str | None = None,
    seed: int | None = 0,
    **cut: int,
) -> TokenizePlan:
    """Plan a tokenization.

    Args:
        inputs: from `find_inputs`.
        tokenizer: tokenizer that encodes them.
        text_column: column of the text; None as in `read_rows`.
        seed: seed of the shuffle; None keeps the order of the inputs.
        cut: `part_bytes` of `list_parts`.

    Raises:
        DataError: parquet metadata is damaged.
    """
    parts = tuple(list_parts(inputs.files, **cut))
    return TokenizePlan(parts=parts, tokenizer=tokenizer, text_column=text_column, seed=seed)


def difference(begun: TokenizePlan | None, plan: TokenizePlan) -> str:
    """Describe what differs between an existing plan and this one.

    Args:
        begun: the existing plan; None if another version of phi4 wrote it.
        plan: the current plan.
    """
    if begun is None or begun.format_version != plan.format_version:
        return "another version of phi4"
    if begun.tokenizer != plan.tokenizer:
        ids = [facts.fingerprint[:12] for facts in (begun.tokenizer, plan.tokenizer)]
        return f"another tokenizer ({ids[0]}, now {ids[1]})"
    if begun.seed != plan.seed:
        seeds = ["--keep-order" if p.seed is None else f"--seed {p.seed}" for p in (begun, plan)]
        return f"another order ({seeds[0]}, now {seeds[1]})"
    if begun.text_column != plan.text_column:
        columns = [p.text_column or f"{TEXT_COLUMN} by default" for p in (begun, plan)]
        return f"another --text-field ({columns[0]}, now {columns[1]})"
    return _difference_of_inputs(begun.files(), plan.files())


def _difference_of_inputs(begun: dict[str, InputFile], now: dict[str, InputFile]) -> str:
    with_ = _first_of("with", begun.keys() - now.keys())
    without = _first_of("without", now.keys() - begun.keys())
    if with_ or without:
        return f"other inputs: {', '.join([*with_, *without])}"
    for path in sorted(begun):
        if begun[path].num_bytes != now[path].num_bytes:
            return (
                f"other inputs: {path} had {begun[path].num_bytes} bytes, now {now[path].num_bytes}"
            )
    for path in sorted(begun):
        if begun[path].mtime_ns != now[path].mtime_ns:
            seconds, nanoseconds = divmod(begun[path].mtime_ns, 10**9)
            return (
                f"another modification time of {path} (if its content is the same, restore it with "
                f"`touch -d @{seconds}.{nanoseconds:09} {path}`)"
            )
    return "the same inputs in another order or split into other parts"


def _first_of(word: str, paths: Set[str]) -> list[str]:
    if not paths:
        return []
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return [f"{word} {min(paths)}{more}"]
