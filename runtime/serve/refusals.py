"""Errors as answers of HTTP, in the shape of OpenAI's: a status, and a body with one line that says what to do."""

from concurrent.futures import CancelledError
from dataclasses import dataclass, field

from tilewright.runtime.errors import InputError, ResourceError, TilewrightError, UsageError

__all__ = ["Refusal", "refusal_of"]

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class Refusal(Exception):
    """A request that is not carried out."""

    status: int
    message: str
    code: str | None = None  # a word for programs
    param: str | None = None  # the field at fault
    retry_s: int | None = None  # seconds after which the same request may work
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)
        if self.retry_s is not None:
            self.headers = self.headers | {"Retry-After": str(self.retry_s)}

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException) -> Refusal:
    """The answer to an error of a restoration. Others than ours are not shown to clients."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, CancelledError):
        return Refusal(503, "the service is stopping; send the request again", "stopping", retry_s=5)
    if isinstance(error, (UsageError, InputError)):
        return Refusal(422, str(error), "invalid_value")
    if isinstance(error, (ResourceError, MemoryError)):
        text = str(error) or "the service has too little memory"
        return Refusal(503, text, "out_of_memory", retry_s=30)
    if isinstance(error, TilewrightError):
        return Refusal(503, str(error), "unavailable", retry_s=30)
    return Refusal(500, "the service failed at this request; its log says why", "internal_error")
