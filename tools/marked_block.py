"""A block of a Markdown file that a tool writes, between two marks."""


def replace_block(text: str, name: str, content: str) -> str:
    """Return the text with new content between `<!-- NAME: begin ... -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: a mark is missing.
    """
    opening, end = f"<!-- {name}: begin", f"<!-- {name}: end -->"
    head, begin, rest = text.partition(opening)
    note, close, block = rest.partition("-->\n")
    _, found_end, tail = block.partition(end)
    if not (begin and close and found_end):
        raise ValueError(f"no block from {opening} ... --> to {end}")
    return f"{head}{begin}{note}{close}{content}\n{end}{tail}"
