"""Errors for clients: a status, and the body in the format of the API.

Errors inside a route are raised as `ApiError`; `phi4.serve.app` writes them in OpenAI's format
under /v1 and in Ollama's under /api.
"""

from enum import StrEnum

UNAVAILABLE = 503


class ErrorType(StrEnum):
    """OpenAI's error types."""

    INVALID_REQUEST = "invalid_request_error"
    AUTHENTICATION = "authentication_error"
    RATE_LIMIT = "rate_limit_error"
    SERVER = "server_error"


class ApiError(Exception):
    """A request that is refused, or failed.

    Args:
        status: HTTP status.
        message: what was received, what is expected, and what to change, in one line.
        kind: kind of the error.
        code: machine-readable code, such as `context_length_exceeded`.
        param: field of the request.
        retry_seconds: time until a retry is useful; sent as Retry-After.
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
        """Return the body in OpenAI's format."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.value,
                "param": self.param,
                "code": self.code,
            }
        }

    def ollama_form(self) -> dict[str, str]:
        """Return the body in Ollama's format."""
        return {"error": self.message}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make a 400 error: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """Make a 503 error: the server accepts no more requests."""
    return ApiError(
        UNAVAILABLE, "the server is shutting down; use another one", kind=ErrorType.SERVER
    )
