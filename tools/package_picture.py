"""Draw the packages of phi4/ and their imports into docs/architecture.md.

`make picture` writes it; a test compares. Everything is read from the imports and the docstrings,
so the picture shows the actual imports.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.architecture.import_graph import Graph, Source, package_of, read_sources, resolve
from tests.architecture.import_graph import without_shortcuts as reduced
from tests.architecture.import_rules import LAYERS
from tests.architecture.sub_layers import Layers, Parts, depth_in
from tools.marked_block import replace_block

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
WITH_PARTS = ("phi4.data", "phi4.engine")
"""Packages whose parts are drawn as well."""


def pictures(sources: Sequence[Source]) -> str:
    """Return the packages of phi4, and the parts of the large ones, as Mermaid in Markdown."""
    drawn = ["**`phi4`**", _packages(sources)]
    for package in WITH_PARTS:
        parts = Parts(package, sources)
        names = {part: f"{package}.{part}" for part in parts.graph()}
        drawn += [f"**`{package}`**", _mermaid(parts.graph(), names, parts.layers, sources)]
    return "\n\n".join(drawn)


def with_pictures(page: str, sources: Sequence[Source]) -> str:
    """Return the page's text with the pictures in its block."""
    return replace_block(page, "picture", pictures(sources))


def _packages(sources: Sequence[Source]) -> str:
    """phi4's packages and phi4_kernels, each a box."""
    modules = {source.module for source in sources}
    boxes = {module: _box(module) for module in modules if _box(module)}
    graph: dict[str, set[str]] = {box: set() for box in boxes.values()}
    for source in sources:
        for found in source.imports:
            target = boxes.get(resolve(found.module, modules))
            if target and source.module in boxes and target != boxes[source.module]:
                graph[boxes[source.module]].add(target)
    names = {box: box if box == "phi4_kernels" else f"phi4.{box}" for box in graph}
    return _mermaid(graph, names, LAYERS, sources)


def _box(module: str) -> str | None:
    """Return the box of a module; None for the entry points, which only start the command line."""
    if module.split(".")[0] == "phi4_kernels":
        return "phi4_kernels"
    return None if module in ("phi4", "phi4.__main__") else package_of(module)


def _mermaid(
    graph: Graph, modules: Mapping[str, str], layers: Layers, sources: Sequence[Source]
) -> str:
    """Return a graph from top to bottom, without arrows that others imply.

    Args:
        graph: who imports whom.
        modules: dotted name of each box.
        layers: gives the order of the boxes; those without a layer come last.
        sources: their docstrings say what the boxes are.
    """
    said = {source.module: _first_sentence(source.tree) for source in sources}
    depths = {box: depth_in(layers, box) for box in graph}
    ordered = sorted(graph, key=lambda box: (depths[box] is None, depths[box] or 0, box))
    lines = ["```mermaid", "flowchart TD"]
    for box in ordered:
        text = said.get(modules[box], "")
        lines.append(f'  {_id(box)}["<b>{box}</b>{"<br/>" if text else ""}{text}"]')
    arrows = reduced(graph)
    lines += [f"  {_id(box)} --> {_id(to)}" for box in ordered for to in sorted(arrows[box])]
    return "\n".join([*lines, "```"])


def _id(box: str) -> str:
    return box.replace(".", "_")


def _first_sentence(tree: ast.Module) -> str:
    """What a module says it is, without its own name, in characters that Mermaid takes as text."""
    text = " ".join((ast.get_docstring(tree) or "").split())
    sentence = re.split(r"(?<=[\w)])\.(?: |$)", text)[0]
    sentence = re.sub(r"^(?:The )?\w+: ", "", sentence)
    return (sentence[:1].upper() + sentence[1:]).translate(
        {ord("`"): None, ord('"'): "#quot;", ord("<"): "#lt;", ord(">"): "#gt;"}
    )


def main() -> None:
    """Write the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_pictures(page, read_sources(ROOT)), encoding="utf-8")


if __name__ == "__main__":
    main()
