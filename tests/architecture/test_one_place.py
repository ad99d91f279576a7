"""Four questions a newcomer asks, each with one file for an answer, from the public names on."""

import ast
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from phi4 import config, stages
from phi4.engine import checkpoint
from phi4.engine.model import implementations
from tests.architecture.import_graph import Source
from tests.architecture.test_architecture_page import ROWS
from tools.package_picture import ROOT


def calls(name: str) -> Callable[[ast.AST], bool]:
    """A call of this dotted name."""
    return lambda node: isinstance(node, ast.Call) and ast.unparse(node.func) == name


def assigns(name: str) -> Callable[[ast.AST], bool]:
    """An annotated module constant of this name."""
    return lambda node: isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name


def computes_loss(node: ast.AST) -> bool:
    """A class that is called with an engine's `LossInputs`."""
    methods = node.body if isinstance(node, ast.ClassDef) and node.name != "Objective" else []
    return any(
        isinstance(method, ast.FunctionDef)
        and method.name == "__call__"
        and "LossInputs" in ast.unparse(method.args)
        for method in methods
    )


ANSWERS = [
    ("Where is the loss", stages.stage_of(config.Recipe()).make_objective(None), computes_loss),
    ("Where is a checkpoint written", checkpoint.save_checkpoint, calls("dist_checkpointing.save")),
    ("Where is a key checked", config.check, assigns("RULES")),
    ("RoPE's implementation", implementations.choose, calls("dispatch.choose")),
]


@pytest.mark.parametrize(("question", "public", "does_it"), ANSWERS, ids=[a[0] for a in ANSWERS])
def test_question_leads_to_one_file(
    question: str, public: object, does_it: Callable[[ast.AST], bool], sources: Sequence[Source]
) -> None:
    [answered] = {path for asked, path, _ in ROWS if question in asked}
    defined = public if inspect.isroutine(public) else type(public)
    assert Path(inspect.getsourcefile(defined)).relative_to(ROOT).as_posix() == answered
    does = {
        source.path
        for source in sources
        if source.path.startswith("phi4/")
        if any(does_it(node) for node in ast.walk(source.tree))
    }
    # A stage has a file of its own: all of them lie in one folder.
    others = {path for path in does if Path(path).parent != Path("phi4/stages")}
    assert answered in does
    assert others <= {answered}
