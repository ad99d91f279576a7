"""Judges that are functions: what they reply is known."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from phi4.sampling.judge import JudgeReply
from phi4.sampling.judge_prompt import Showing


def opinion(first: int, second: int, **more: object) -> str:
    """A reply with these scores, the same in all three respects."""
    rated = [dict.fromkeys(("accuracy", "style", "detail"), score) for score in (first, second)]
    value = {
        "faults": {"first": [{"cause": "logic", "description": "a step"}], "second": []},
        "comparison": "One is better.",
        "scores": dict(zip(("first", "second"), rated, strict=True)),
    }
    return json.dumps(value | more)


@dataclass
class FunctionJudge:
    """Replies what a function says; counts what it is asked."""

    reply_to: Callable[[Showing, int], str]
    identity: str = "function"
    num_asked: int = 0
    attempts: list[int] = field(default_factory=list)

    def replies(
        self, showings: Mapping[int, Showing], attempt: int
    ) -> Iterator[tuple[int, JudgeReply]]:
        """See `Judge.replies`; the last one first."""
        self.attempts.append(attempt)
        for index, showing in reversed(showings.items()):
            self.num_asked += 1
            yield index, JudgeReply(self.reply_to(showing, attempt))


def quality(text: str) -> int:
    """What an honest judge sees in an answer that begins with its quality."""
    return int(text[0])


def honest(showing: Showing, attempt: int) -> str:
    """Scores that are the qualities."""
    return opinion(quality(showing.first), quality(showing.second))


def always_first(showing: Showing, attempt: int) -> str:
    """The one that is shown first, whatever it says."""
    return opinion(5, 1)
