"""The model of a command that asks one: on this machine in any layout, or behind an endpoint."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from phi4.cli.data_options import tokenizer_of
from phi4.cli.model_ranks import on_model_ranks
from phi4.errors import ConfigError

if TYPE_CHECKING:
    from phi4.convert.model_source import ModelSource
    from phi4.data.vocabulary.tokenizer import Tokenizer
    from phi4.sampling.endpoint import Endpoint
    from phi4.sampling.protocol import Sampler

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""The name that endpoints' other clients use; a key on a command line is in the process list."""

ModelPlace = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run directory, a step_NNNNNNN directory, a Hugging Face directory, or the "
        "address of an OpenAI-compatible endpoint that accepts token ids, "
        "http://HOST:PORT/v1#NAME; its key is read from OPENAI_API_KEY.",
    ),
]


class AskedModel(Protocol):
    """A model that a command asks.

    Attributes:
        identity: tells it from other models; a store of its answers keeps it.
        max_sequence_tokens: prompt and new tokens together; None where only the model knows.
    """

    @property
    def identity(self) -> str: ...

    @property
    def max_sequence_tokens(self) -> int | None: ...

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer of its ids."""

    def ask(
        self,
        argv: Sequence[str],
        cache_tokens: int | None,
        use: Callable[["Sampler"], None],
    ) -> int:
        """Call `use` with a sampler over it.

        Args:
            argv: arguments that make `phi4` call this method again, for workers of a layout.
            cache_tokens: as in `on_model_ranks`; without effect on an endpoint.
            use: called once, in this process or in the leading worker.

        Returns:
            Exit code.
        """


@dataclass(frozen=True)
class LocalModel:
    """A model on disk; see `AskedModel`."""

    source: "ModelSource"

    @property
    def identity(self) -> str:
        """Its path; a checkpoint is never written twice."""
        return str(self.source.path.resolve())

    @property
    def max_sequence_tokens(self) -> int | None:
        """Of the model."""
        return self.source.recipe.model.max_position_embeddings

    def tokenizer(self) -> "Tokenizer":
        """See `AskedModel.tokenizer`."""
        return self.source.tokenizer()

    def ask(
        self, argv: Sequence[str], cache_tokens: int | None, use: Callable[["Sampler"], None]
    ) -> int:
        """See `AskedModel.ask`."""
        return on_model_ranks(argv, self.source, cache_tokens, use)


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an endpoint; see `AskedModel`."""

    endpoint: "Endpoint"
    ranks: str | None
    max_sequence_tokens: int | None = None

    @property
    def takes_all(self) -> bool:
        """Whether it can do all that a request may ask for; see `recognised`."""
        return self.endpoint.form == "phi4"

    @property
    def identity(self) -> str:
        """Address and name."""
        return f"{self.endpoint.base_url}#{self.endpoint.model}"

    def tokenizer(self) -> "Tokenizer":
        """See `AskedModel.tokenizer`."""
        return tokenizer_of(self.ranks)

    def ask(
        self, argv: Sequence[str], cache_tokens: int | None, use: Callable[["Sampler"], None]
    ) -> int:
        """See `AskedModel.ask`; in this process."""
        from phi4.sampling.http import HttpSampler

        sampler = HttpSampler(self.endpoint, self.tokenizer(), self.max_sequence_tokens)
        try:
            use(sampler)
        finally:
            sampler.close()
        return 0


def find_asked_model(place: str, overrides: Sequence[str], ranks: str | None) -> AskedModel:
    """The model that a command names.

    Args:
        place: a path, or http://HOST:PORT/v1#NAME.
        overrides: layout of a model on disk.
        ranks: rank file of an endpoint's tokenizer; None for phi-4's.

    Returns:
        An endpoint is sent the key of the environment, if there is one.

    Raises:
        ConfigError: an address without a name, or options that the other kind of model has.
        CheckpointError, LayoutError: see `find_model`.
    """
    if not place.startswith(("http://", "https://")):
        if ranks is not None:
            raise ConfigError(f"--ranks={ranks} is for an endpoint; {place} has its own tokenizer")
        from phi4.convert.model_source import find_model

        return LocalModel(find_model(Path(place), overrides))
    if overrides:
        raise ConfigError(
            f"{overrides[0]} sets the layout of a local model; {place} is an endpoint"
        )
    base_url, _, name = place.partition("#")
    if not name:
        raise ConfigError(f"{place} has no model name; write {place}#NAME")
    from phi4.sampling.endpoint import Endpoint, PromptForm

    key = os.environ.get(API_KEY_VARIABLE)
    return RemoteModel(
        Endpoint(base_url=base_url, model=name, form=PromptForm.IDS, api_key=key), ranks
    )


def recognised(model: AskedModel) -> AskedModel:
    """The same model, asked for all that `phi4 serve` can do if it is behind one.

    Raises:
        ConfigError: the endpoint is out of reach, or its tokenizer is another one.
    """
    if not isinstance(model, RemoteModel):
        return model
    from phi4.sampling.endpoint import PromptForm
    from phi4.sampling.endpoint_card import OWNER, endpoint_card

    card = endpoint_card(model.endpoint)
    if card.get("owned_by") != OWNER:
        return model
    expected, found = card["tokenizer"], model.tokenizer().fingerprint
    if expected != found:
        raise ConfigError(
            f"{model.identity} has the tokenizer {str(expected)[:12]}, this command has "
            f"{found[:12]}; give the rank file of the server's model with --ranks"
        )
    endpoint = replace(model.endpoint, form=PromptForm.PHI4)
    return replace(model, endpoint=endpoint, max_sequence_tokens=int(str(card["max_model_len"])))
