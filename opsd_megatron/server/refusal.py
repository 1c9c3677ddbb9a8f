"""What the server answers when it will not do something."""


class Refusal(Exception):
    """Becomes an HTTP reply with `status` and vLLM's error body."""

    def __init__(self, status: int, message: str, kind: str | None = None):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


KINDS = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}


def error_body(status: int, message: str, kind: str | None = None) -> dict:
    """`kind` is for errors that a client tells apart by more than the status."""
    kind = kind or KINDS.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
