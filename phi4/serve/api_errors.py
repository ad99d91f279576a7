"""What a client is told that cannot be answered: a status, and the error in the words of its API.

Whatever goes wrong inside a route is raised as `ApiError`; `phi4.serve.app` writes it in OpenAI's
form under /v1 and in Ollama's under /api.
"""

from enum import StrEnum


class ErrorType(StrEnum):
    """OpenAI's kinds of errors."""

    INVALID_REQUEST = "invalid_request_error"
    AUTHENTICATION = "authentication_error"
    RATE_LIMIT = "rate_limit_error"
    SERVER = "server_error"


class ApiError(Exception):
    """A request that is refused, or failed.

    Args:
        status: of HTTP.
        message: what was got, what is expected, and what to change, in one line.
        kind: of the error.
        code: a word that programs compare, as `context_length_exceeded`.
        param: field of the request.
        retry_seconds: when it is worth asking again; sent as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: ErrorType = ErrorType.INVALID_REQUEST,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.code, self.param, self.retry_seconds = code, param, retry_seconds

    def openai_form(self) -> dict[str, dict[str, str | None]]:
        """The body of OpenAI's API."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.value,
                "param": self.param,
                "code": self.code,
            }
        }

    def ollama_form(self) -> dict[str, str]:
        """The body of Ollama's API."""
        return {"error": self.message}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)
