"""The program in an answer.

The decision: it is the last fenced block, because a model corrects itself downwards; blocks that
say they are something else, such as the output of the program, are passed over where another one
is left.
"""

import re
from collections.abc import Sequence

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)


def program_in(answer: str, labels: Sequence[str]) -> str:
    """The last block labelled as the language, else the last without a label, else the last one.

    An answer without a fence is a program as a whole; a fence that is never closed ends with the
    text.

    Args:
        answer: text of the model.
        labels: names of the language, in lower case.
    """
    blocks = _blocks(answer)
    if not blocks:
        return answer
    for wanted in (labels, ("",)):
        named = [text for label, text in blocks if label in wanted]
        if named:
            return named[-1]
    return blocks[-1][1]


def _blocks(answer: str) -> list[tuple[str, str]]:
    blocks: list[tuple[str, str]] = []
    opened: re.Match | None = None
    for fence in _FENCE.finditer(answer):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            text = answer[opened.end() + 1 : fence.start()]
            blocks.append((opened[2].lower(), text))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), answer[opened.end() + 1 :]))
    return blocks
