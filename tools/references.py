"""Write docs/recipe.md and docs/cli.md: every key of the recipe, every command.

`make references` writes them; a test compares. What stands outside the marks is written by hand.
"""

from collections.abc import Iterable
from pathlib import Path

from phi4.config.reference import KIND_TEXTS, SectionReference, reference
from tools import command_reference
from tools.marked_block import replace_block

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def recipe_page(sections: Iterable[SectionReference]) -> str:
    """Return the keys as Markdown, a table per section."""
    lines = ["| kind | what a change means |", "|---|---|"]
    lines += [f"| {kind} | {text} |" for kind, text in KIND_TEXTS.items()]
    for section in sections:
        lines += ["", f"## {section.name.removesuffix('[]')}", ""]
        lines += [f"`{section.header}` {section.text}", ""]
        lines += ["| key | type | default | kind | meaning |", "|---|---|---|---|---|"]
        for key in section.keys:
            name = key.key.removeprefix(f"{section.name}.")
            default = key.default_text if key.required else f"`{key.default_text}`"
            cells = (f"`{name}`", f"`{key.type}`", default, key.kind, key.text)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def blocks() -> dict[Path, tuple[str, str]]:
    """For each page the name of its block and its current content."""
    return {
        DOCS / "recipe.md": ("keys", recipe_page(reference())),
        DOCS / "cli.md": ("commands", command_reference.page()),
    }


def main() -> None:
    """Write the pages."""
    for page, (name, content) in blocks().items():
        text = page.read_text(encoding="utf-8")
        page.write_text(replace_block(text, name, content), encoding="utf-8")


if __name__ == "__main__":
    main()
