"""The two ways in which somebody else is wrong: a peer (`WireError`) or a configuration (`ConfigError`).

Expected outcomes are values (`types.Rejection`), not exceptions. Anything else that is raised is a bug of ours.
"""

import errno

_NO_PORT = {
    errno.EADDRINUSE: "another program listens there; take another port (0: a free one), or stop it",
    errno.EADDRNOTAVAIL: "this machine does not have that address",
    errno.EACCES: "this user may not use that port; those from 1024 on are free to all",
}


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


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    """An address that cannot be had, in words for people: the system's repeat it, and do not say what to do."""
    why = _NO_PORT.get(error.errno or 0) or error.strerror or error
    return ConfigError(f"cannot listen on {host or '*'}:{port}: {why}")
