"""Extract the program in an answer.

It is the last fenced block, because a model corrects itself later in the text; blocks with another
label, such as the program's output, are skipped if there is another block.
"""

import re
from collections.abc import Sequence

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)


def program_in(answer: str, labels: Sequence[str]) -> str:
    """Return the last block labelled as the language, else the last without a label, else the last
    one.

    An answer without a fence is a program in its entirety; an unclosed fence ends with the text.

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
