"""The options of every command that samples, and the request that they make of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import typer

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError
from phi4.sampling.protocol import Request
from phi4.sampling.text import end_ids

MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens per sample.")]
Temperature = Annotated[float, typer.Option(help="Softmax temperature; 0 is greedy decoding.")]
TopP = Annotated[
    float,
    typer.Option(
        help="Nucleus sampling: sample from the most likely tokens that together have this "
        "probability."
    ),
]
TopK = Annotated[
    int, typer.Option(help="Sample from this many of the most likely tokens; 0 for all.")
]
MinP = Annotated[
    float,
    typer.Option(
        help="Sample from tokens at least this fraction as likely as the most likely one."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Sampling seed. A token depends on the seed, the sample and the position only."
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End a sample before this text; repeatable."),
]
CacheTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Size of the KV cache in tokens, over all samples; by default twice the "
        "model's maximum sequence length, at least 16,384.",
        show_default=False,
    ),
]


System = Annotated[
    str | None, typer.Option(help="System message for conversations without one; needs --chat.")
]
IsUserTurn = Annotated[
    bool, typer.Option(help="Treat `prompt` as a user turn instead of plain text.")
]


def check_system(system: str | None, chat: bool) -> None:
    """Refuse a system message for prompts that are texts.

    Raises:
        ConfigError: there is one.
    """
    if system is not None and not chat:
        raise ConfigError("--system needs conversations, and the prompts are texts; add --chat")


@dataclass(frozen=True)
class SamplingOptions:
    """How new tokens are drawn, as a command was asked; see `phi4.sampling.protocol.Request`."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]

    def request(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        *,
        n: int = 1,
        max_tokens: int | None = None,
        log_probs: bool = False,
    ) -> Request:
        """What is asked of a model after a prompt.

        Args:
            prompt: token ids.
            tokenizer: of the ids; a sample ends with either of its end tokens.
            n: samples.
            max_tokens: fewer than the option says.
            log_probs: whether new tokens carry theirs.
        """
        return Request(
            prompt=tuple(prompt),
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            n=n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop_ids=end_ids(tokenizer),
            # Arguments that are not UTF-8 are stopped at as the bytes that they are.
            stop_strings=tuple(text.encode(errors="surrogateescape") for text in self.stop),
            log_probs=log_probs,
        )

    def arguments(self) -> list[str]:
        """The options on a command line."""
        plain = [field.name for field in fields(self) if field.name != "stop"]
        options = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in plain]
        return [*options, *(f"--stop={text}" for text in self.stop)]
