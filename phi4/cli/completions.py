"""The samples of a command: requests of its prompts, and what is printed of them.

What iterates over a sampler's events closes them, so that whatever ends the printing cancels the
requests, before the sampler itself is closed.
"""

import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import typer

from phi4.cli.sampling_options import SamplingOptions
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError
from phi4.sampling.batch import events
from phi4.sampling.checks import check_request
from phi4.sampling.prompts import Prompt
from phi4.sampling.protocol import Completion, ModelLimits, NewToken, Request, Sampler
from phi4.sampling.text import TextStream, completion_text


@dataclass(frozen=True)
class Asking:
    """How every prompt of a command is asked.

    Attributes:
        options: of the command.
        tokenizer: of the model.
        n: samples of each prompt.
        log_probs: whether their tokens carry log-probs.
    """

    options: SamplingOptions
    tokenizer: Tokenizer
    n: int
    log_probs: bool

    def request(self, prompt: Prompt, limits: ModelLimits) -> Request:
        """What is asked of the model.

        Raises:
            ConfigError: it is impossible; the message begins with the place of the prompt.
        """
        request = self.options.request(
            prompt.ids, self.tokenizer, n=self.n, log_probs=self.log_probs
        )
        try:
            check_request(request, limits)
        except ConfigError as error:
            raise ConfigError(f"{prompt.place}: {error}") from None
        return request


class _Finished(NamedTuple):
    """A finished sample, the place of its prompt, and what was asked."""

    place: int
    prompt: Prompt
    request: Request
    completion: Completion


def print_live(sampler: Sampler, asking: Asking, prompt: Prompt) -> None:
    """One sample, as it is made; a text with its beginning."""
    request = asking.request(prompt, sampler.limits)
    stream = TextStream(asking.tokenizer, request.stop_ids, request.stop_strings)
    shown = prompt.text
    with closing(events(sampler, [request])) as happened:
        for _, event in happened:
            if isinstance(event, NewToken):
                typer.echo(shown + stream.feed(event.token.id), nl=False)
                shown = ""
    typer.echo(stream.finish())


def print_finished(sampler: Sampler, asking: Asking, prompts: Iterable[Prompt]) -> None:
    """Samples as they end, each below a line that names it."""
    with closing(_finished(sampler, asking, prompts)) as samples:
        for index, prompt, request, completion in samples:
            text = prompt.text + completion_text(asking.tokenizer, request, completion)
            name = f"prompt {index}, sample {completion.sample}: {completion.finish_reason}"
            typer.echo(f"==> {name} <==\n{text}")


def print_json(sampler: Sampler, asking: Asking, prompts: Iterable[Prompt]) -> None:
    """Samples as they end, each an object on a line of its own."""
    with closing(_finished(sampler, asking, prompts)) as samples:
        for index, _, request, completion in samples:
            row: dict[str, object] = {
                "index": index,
                "sample": completion.sample,
                "text": completion_text(asking.tokenizer, request, completion),
                "finish_reason": completion.finish_reason,
                "tokens": [token.id for token in completion.tokens],
            }
            if asking.log_probs:
                row["log_probs"] = [token.log_prob for token in completion.tokens]
            typer.echo(json.dumps(row))


def _finished(
    sampler: Sampler, asking: Asking, prompts: Iterable[Prompt]
) -> Generator[_Finished, None, None]:
    asked: dict[int, tuple[Prompt, Request]] = {}
    num_left: dict[int, int] = {}

    def requests() -> Iterator[Request]:
        for index, prompt in enumerate(prompts):
            request = asking.request(prompt, sampler.limits)
            asked[index], num_left[index] = (prompt, request), request.n
            yield request

    with closing(events(sampler, requests())) as happened:
        for index, event in happened:
            if isinstance(event, Completion):
                yield _Finished(index, *asked[index], event)
                num_left[index] -= 1
                if not num_left[index]:
                    del asked[index], num_left[index]
