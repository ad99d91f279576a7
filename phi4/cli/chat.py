"""`phi4 chat`: a conversation with a model in the terminal, in any layout."""

import sys
from typing import Annotated

import typer

from phi4.cli.command_words import option_words
from phi4.cli.conversation import Dialogue, converse
from phi4.cli.model_ranks import CheckpointPath, on_model_ranks
from phi4.cli.sampling_options import (
    CacheTokens,
    MaxTokens,
    MinP,
    SamplingOptions,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from phi4.sampling.checks import check_request
from phi4.sampling.protocol import ModelLimits, Sampler


def chat(
    checkpoint: CheckpointPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Layout overrides, for example parallel.tensor=2; one process by default."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    stop: Stop = None,
    cache_tokens: CacheTokens = None,
) -> None:
    """Chat with a model: each line is a turn, and the answer is printed while it is generated.

    `/reset` starts a new conversation; `/exit` or the end of the input ends the program. Ctrl-C
    stops an answer, which stays in the conversation as far as it was generated; at the prompt it
    ends the program. A turn that exceeds the model's maximum sequence length is refused and the
    conversation stays unchanged. Input may come through a pipe.

    Overrides set the layout, for example parallel.tensor=2 parallel.pipeline=2 for four processes.
    """
    from phi4.convert.model_source import find_model

    source = find_model(checkpoint, overrides or [])
    tokenizer = source.tokenizer()
    options = SamplingOptions(max_tokens, temperature, top_p, top_k, min_p, seed, tuple(stop or ()))
    # An answer may be shorter than asked for; everything else is checked before processes start.
    check_request(options.request((0,), tokenizer, max_tokens=1), ModelLimits(tokenizer.vocab_size))

    def use(sampler: Sampler) -> None:
        converse(Dialogue(sampler, tokenizer, options, system), sys.stdin.fileno())

    argv = [
        "chat",
        *option_words({"--system": system, "--cache-tokens": cache_tokens}),
        *options.arguments(),
        *("--", str(source.path), *(overrides or [])),
    ]
    raise typer.Exit(on_model_ranks(argv, source, cache_tokens, use, interactive=True))
