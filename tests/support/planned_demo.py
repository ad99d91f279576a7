"""The commands of `phi4 demo --post-training`, none of which is run."""

from pathlib import Path

import pytest

from phi4.cli import demo_post_training
from phi4.cli.demo_post_training import ChainSettings, run_chain
from phi4.pts.score import Score
from phi4.pts.select_checkpoint import Selection

BEST = "checkpoints/step_0000030"
"""The checkpoint of every run that is said to be the best."""


def even_score(share: float) -> Score:
    """Ten questions, whose shares are around the given one."""
    shares = {str(i): share + (0.05 if i % 2 else -0.05) for i in range(10)}
    return Score(shares, 80, 0, 0, 0)


def planned_commands(settings: ChainSettings, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Words of every `phi4` command of a chain, in order."""
    return [words for _, words in planned_sections(settings, monkeypatch)]


def planned_sections(
    settings: ChainSettings, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, list[str]]]:
    """Heading and words of every `phi4` command of a chain, in order."""
    sections: list[tuple[str, list[str]]] = []

    def run_phi4(why: str, *words: object) -> None:
        assert why.endswith((".", "?"))
        sections.append((why, list(map(str, words))))

    def read_selection(path: Path) -> Selection:
        best = str(path.parent / BEST)
        return Selection(checkpoint=best, questions="", oracle="", n=8, candidates=())

    with monkeypatch.context() as patch:
        patch.setattr(demo_post_training, "run_phi4", run_phi4)
        patch.setattr(demo_post_training, "read_selection", read_selection)
        patch.setattr(demo_post_training, "scored", lambda path, oracle: even_score(0.5))
        run_chain(settings)
    return sections
