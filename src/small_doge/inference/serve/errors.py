"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: of HTTP.
        message: one sentence: what was found and what is expected.
        param: the field of the request that is meant.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be understood or granted: 400."""
    return ApiError(400, message, param, code)


def overloaded(message: str) -> ApiError:
    """No room now: 503, with a word on when to come again."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "5"})


def first_problem(errors: Any) -> ApiError:
    """What pydantic found, in one sentence about the first thing; the request's own text is not repeated."""
    problem = errors[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    # Behind a field that may be of several types stands the type that was tried: "stop.constrained-str".
    param = ".".join(part for part in place if part.isidentifier() or part.isdigit()) or None
    if problem["type"] == "json_invalid":
        return invalid("the body is not JSON", code="invalid_json")
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return invalid(f"`{param}`: {message}" if param else message, param, problem["type"])
