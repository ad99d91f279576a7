"""The served model's metadata, and the checks that every request must pass."""

from dataclasses import dataclass

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError
from phi4.sampling.checks import check_request
from phi4.sampling.protocol import ModelLimits, Request
from phi4.serve.api_errors import bad_request


@dataclass(frozen=True)
class ServedModel:
    """A model as presented to clients.

    Attributes:
        name: name in requests.
        tokenizer: tokenizer of its ids.
        limits: limits of its requests.
        created_unix: creation time, in seconds.
        default_max_tokens: new tokens of a request without a limit.
        num_parameters: number of parameters, if known.
        weights_type: dtype of its weights, in safetensors' names: F32, BF16 or F16.
    """

    name: str
    tokenizer: Tokenizer
    limits: ModelLimits
    created_unix: int
    default_max_tokens: int = 2048
    num_parameters: int | None = None
    weights_type: str | None = None

    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        """Return the new tokens of a request: as many as requested, else the default that fits."""
        longest = self.limits.max_sequence_tokens
        if asked is not None or longest is None:
            return self.default_max_tokens if asked is None else asked
        return max(1, min(self.default_max_tokens, longest - num_prompt_tokens))

    def checked(self, request: Request, length_field: str = "max_tokens") -> Request:
        """Return a request that the model can answer.

        Args:
            request: any.
            length_field: the API's name of the number of new tokens.

        Raises:
            ApiError: 400; `context_length_exceeded` if prompt and new tokens are too many.
        """
        longest, num_prompt = self.limits.max_sequence_tokens, len(request.prompt)
        if longest is not None and num_prompt + request.max_tokens > longest:
            raise bad_request(
                f"This model's maximum context length is {longest} tokens, but the request has "
                f"{num_prompt + request.max_tokens}: {num_prompt} of the prompt and "
                f"{request.max_tokens} to be generated; shorten the prompt or lower {length_field}",
                param=length_field if num_prompt < longest else "prompt",
                code="context_length_exceeded",
            )
        try:
            check_request(request, self.limits)
        except ConfigError as error:
            raise bad_request(str(error)) from None
        return request
