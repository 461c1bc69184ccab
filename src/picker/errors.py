"""The two ways in which somebody else is wrong: a peer (`WireError`) or a configuration (`ConfigError`).

Expected outcomes are values (`types.Rejection`), not exceptions. Anything else that is raised is a bug of ours.
"""


class WireError(Exception):
    """A peer sent what we cannot use. Raised in `wire`, answered in `exchange`.

    status: the HTTP status to answer with. `kind` and `param` follow the OpenAI error object (`type`, `param`);
    the message names what is wrong and how to mend it, and never quotes a prompt.
    """

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param


class ConfigError(Exception):
    """A configuration, flag or data file that cannot be used; the message says where and how to mend it."""
