"""`phi4 generate`: a checkpoint continues a prompt, live in any layout."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi4.config import Recipe, check
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.launch import WorkerEnvironment, join, on_ranks
from phi4.sampling.text import end_ids, text_pieces

if TYPE_CHECKING:
    from phi4.engine.platform import Platform


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step_NNNNNNN directory, or a run directory (its latest).")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, for example parallel.tensor=2; else one process."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed.")] = 0,
) -> None:
    """Continue a prompt with a checkpoint, in any layout.

    The text goes to stdout as it is made and ends with the document or the turn, at the latest
    after --max-tokens. Platform and layout go to stderr.
    """
    from phi4.engine.checkpoint import recipe_of
    from phi4.rundir.checkpoints import find_checkpoint

    # The workers get the checkpoint itself: `latest` of a live run may move on between them.
    found = find_checkpoint(checkpoint)
    recipe = recipe_of(found, overrides or [])

    def body(worker: WorkerEnvironment) -> None:
        from phi4.engine.platform import disconnect

        check(recipe, worker.world_size)
        platform = join(worker, recipe.run.platform, recipe.run.threads)
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        for piece in _continuation(recipe, found, platform, prompt, **options):
            if platform.is_writer:
                typer.echo(piece, nl=False)
        disconnect()

    argv = [
        *("generate", str(found), *(overrides or []), f"--prompt={prompt}"),
        *(f"--max-tokens={max_tokens}", f"--temperature={temperature}", f"--seed={seed}"),
    ]
    num_workers = recipe.parallel.model_parallel_size * max(recipe.parallel.data, 1)
    logs = Path(tempfile.gettempdir()) / f"phi4-generate-{os.getpid()}"
    raise typer.Exit(on_ranks(argv, body, num_workers=num_workers, work_dir=logs))


def _continuation(
    recipe: Recipe, checkpoint: Path, platform: "Platform", prompt: str, **options: float
) -> Iterator[str]:
    """The prompt and what follows it, to the end of a document or turn, closed by a newline.

    Collectives: those of building the engine, of loading and of every token.
    """
    from phi4.engine.checkpoint import open_checkpoint
    from phi4.engine.generate import generate as generate_tokens

    tokenizer = load_tokenizer(recipe.tokenizer)
    engine = open_checkpoint(recipe, checkpoint, platform)
    if platform.is_writer:
        typer.echo(f"{platform.describe()}\n{engine.layout.describe()}", err=True)
    stop_ids = end_ids(tokenizer)
    tokens = generate_tokens(
        engine,
        tokenizer.encode(prompt),
        vocab_size=tokenizer.vocab_size,
        stop_ids=stop_ids,
        **options,
    )
    yield prompt
    yield from text_pieces(tokenizer, tokens, stop_ids)
    yield "\n"
    engine.close()
