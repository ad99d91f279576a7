"""`phi4 generate`: a model continues texts or answers conversations, in any layout."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.command_words import option_words
from phi4.cli.completions import Asking, print_finished, print_json, print_live
from phi4.cli.model_ranks import CheckpointPath, on_model_ranks
from phi4.cli.sampling_options import (
    CacheTokens,
    MaxTokens,
    MinP,
    SamplingOptions,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    check_system,
)
from phi4.errors import ConfigError, DataError
from phi4.sampling.prompts import STDIN, Prompt, PromptReader
from phi4.sampling.protocol import ModelLimits, Sampler

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_0-9]+=")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PROMPT]... [SECTION.KEY=VALUE]...",
        help="Texts to continue. A word of the form section.key=value is an override of "
        "the recipe; put a prompt of that form into the --prompts file.",
        show_default=False,
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='More prompts, one JSON object per line: {"prompt": "text"} or {"messages": '
        '[{"role": "user", "content": "text"}]}; - reads stdin.',
    ),
]
IsChat = Annotated[
    bool, typer.Option("--chat", help="Treat every prompt as a user turn and print the answer.")
]
Samples = Annotated[int, typer.Option("--n", min=1, help="Samples per prompt.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per finished sample.")]
WithLogProbs = Annotated[
    bool,
    typer.Option("--log-probs", help="Print the log-probability of every token; needs --json."),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Compute in passes of fixed size: log-probabilities are bit-identical "
        "whatever else is in the batch.",
    ),
]


def generate(
    checkpoint: CheckpointPath,
    words: Words = None,
    prompts: PromptsFile = None,
    chat: IsChat = False,
    system: System = None,
    n: Samples = 1,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    stop: Stop = None,
    as_json: AsJson = False,
    log_probs: WithLogProbs = False,
    cache_tokens: CacheTokens = None,
    batch_invariant: BatchInvariant = False,
) -> None:
    """Continue texts or answer conversations with a model, in any layout of one replica.

    A sample ends at the end of its document or turn, at a --stop, or after --max-tokens. A single
    sample is printed while it is generated. Of several, each is printed when it is finished, below
    a line `==> prompt I, sample J: REASON <==`; REASON is stop or length, I and J count from 0,
    first the PROMPTs, then the lines of the file. A continued text is printed with its prompt.

    With --json a sample is an object with index (I), sample (J), text (the new text only),
    finish_reason, tokens (ids) and log_probs (of the model at temperature 1 without truncation).

    Overrides set the layout, for example parallel.tensor=2 parallel.pipeline=2 for four processes.
    The output does not depend on the layout. Samples go to stdout; platform, layout and cache size
    go to stderr.
    """
    from phi4.convert.model_source import find_model

    texts = [word for word in words or () if not _OVERRIDE.match(word)]
    overrides = [word for word in words or () if _OVERRIDE.match(word)]
    if log_probs and not as_json:
        raise ConfigError("--log-probs needs JSON output; add --json")
    _check_prompts(texts, prompts, system, chat)
    source = find_model(checkpoint, overrides)
    tokenizer = source.tokenizer()
    options = SamplingOptions(max_tokens, temperature, top_p, top_k, min_p, seed, tuple(stop or ()))
    asking = Asking(options, tokenizer, n, log_probs)
    reader = PromptReader(tokenizer, chat, system)
    limits = ModelLimits(tokenizer.vocab_size, source.recipe.model.max_position_embeddings)
    # Errors in these are reported before processes start and weights are read.
    for prompt in reader.of_texts(texts) if texts else [Prompt("options", (0,), "")]:
        asking.request(prompt, limits)

    def use(sampler: Sampler) -> None:
        of_file = reader.of_file(prompts) if prompts else ()
        _print(sampler, asking, chain(reader.of_texts(texts), of_file), as_json)

    values = {
        "--chat": chat,
        "--json": as_json,
        "--log-probs": log_probs,
        "--batch-invariant": batch_invariant,
        "--prompts": prompts,
        "--system": system,
        "--n": n,
        "--cache-tokens": cache_tokens,
    }
    place = ["--", str(source.path), *overrides, *texts]
    how = {"batch_invariant": batch_invariant, "interactive": prompts == STDIN}
    argv = ["generate", *option_words(values), *options.arguments(), *place]
    raise typer.Exit(on_model_ranks(argv, source, cache_tokens, use, **how))


def _check_prompts(
    texts: Sequence[str], prompts: Path | None, system: str | None, chat: bool
) -> None:
    if not texts and prompts is None:
        raise ConfigError("there is no prompt; give PROMPT or --prompts FILE")
    check_system(system, chat)
    if prompts not in (None, STDIN) and not prompts.is_file():
        raise DataError(f"--prompts={prompts} is not a file; give JSON Lines, or - for stdin")


def _print(sampler: Sampler, asking: Asking, prompts: Iterator[Prompt], as_json: bool) -> None:
    first = list(islice(prompts, 2))
    if not first:
        raise DataError("there is no prompt in --prompts; write one JSON object a line")
    if as_json:
        print_json(sampler, asking, chain(first, prompts))
    elif len(first) == asking.n == 1:
        print_live(sampler, asking, first[0])
    else:
        print_finished(sampler, asking, chain(first, prompts))
