"""What a server says of its model, and what every request to it has to keep to."""

from dataclasses import dataclass

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError
from phi4.sampling.checks import check_request
from phi4.sampling.protocol import ModelLimits, Request
from phi4.serve.api_errors import bad_request


@dataclass(frozen=True)
class ServedModel:
    """A model as its clients know it.

    Attributes:
        name: what requests call it.
        tokenizer: of its ids.
        limits: of its requests.
        created_unix: when it was made, in seconds.
        default_max_tokens: new tokens of a request that does not say how many.
        num_parameters: of the model, where it is known.
        weights_type: of its weights, as safetensors names it: F32, BF16 or F16.
    """

    name: str
    tokenizer: Tokenizer
    limits: ModelLimits
    created_unix: int
    default_max_tokens: int = 2048
    num_parameters: int | None = None
    weights_type: str | None = None

    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        """New tokens of a request: as many as it asks for, else what fits of the default."""
        longest = self.limits.max_sequence_tokens
        if asked is not None or longest is None:
            return self.default_max_tokens if asked is None else asked
        return max(1, min(self.default_max_tokens, longest - num_prompt_tokens))

    def checked(self, request: Request, length_field: str = "max_tokens") -> Request:
        """A request that the model can answer.

        Args:
            request: any.
            length_field: what its API calls the number of new tokens.

        Raises:
            ApiError: 400; `context_length_exceeded` where prompt and new tokens are too many.
        """
        longest, num_prompt = self.limits.max_sequence_tokens, len(request.prompt)
        if longest is not None and num_prompt + request.max_tokens > longest:
            raise bad_request(
                f"This model's maximum context length is {longest} tokens, but the request has "
                f"{num_prompt + request.max_tokens}: {num_prompt} of the prompt and "
                f"{request.max_tokens} to be drawn; shorten the prompt or lower {length_field}",
                param=length_field if num_prompt < longest else "prompt",
                code="context_length_exceeded",
            )
        try:
            check_request(request, self.limits)
        except ConfigError as error:
            raise bad_request(str(error)) from None
        return request
