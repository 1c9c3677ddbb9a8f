"""The command: options, token and port first, so that what is wrong with them is said at once; then the server."""

import errno
import os
import socket
import sys

import tyro

from opsd_megatron.errors import ConfigError, UserError
from opsd_megatron.server.options import ServerOptions


def main() -> int:
    """0 after a graceful stop, 2 where the user can mend the cause."""
    options = tyro.cli(ServerOptions, prog="python -m opsd_megatron.server")
    try:
        token = _token(options.token_variable)
        admin_token = _token(options.admin_token_variable) if options.admin_token_variable else None
        if admin_token == token:
            raise ConfigError(
                f"{options.token_variable} and {options.admin_token_variable} hold the same token; make them "
                "differ, or leave --admin-token-variable out"
            )
        if not (options.model / "config.json").is_file():
            raise ConfigError(f"--model {options.model}: no config.json there; give a Hugging Face model directory")
        with listen(options.host, options.port) as listener:
            from opsd_megatron.server.process import serve  # takes seconds: torch and transformers

            return serve(options, token, admin_token, listener)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _token(variable: str) -> str:
    token = os.environ.get(variable, "")
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"environment variable {variable} must hold a bearer token of 8 or more printable characters")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow. Early connections wait in its queue until the server is ready.

    SO_REUSEADDR lets a restarted server have its port back at once; then only listening makes the port exclusive.
    The protocol is named because asyncio switches Nagle's algorithm off only where it is: replies would take 40 ms.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error})"
        raise ConfigError(
            f"--host {host} --port {port} {reason}; stop what listens there or choose another port"
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
