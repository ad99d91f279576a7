"""`phi4 train` as a user starts it, in a directory with a recipe.toml."""

import subprocess
import sys
from pathlib import Path


def train(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments), cwd=root, capture_output=True, text=True, timeout=120, check=False
    )


def command(*arguments: str) -> list[str]:
    """The command line for `recipe.toml`."""
    return [sys.executable, "-m", "phi4", "train", "recipe.toml", *arguments]
