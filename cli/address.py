"""Addresses that servers of commands listen on."""

import errno
import socket

from vlv.errors import UserError


def check_address(host: str, port: int) -> None:
    """Raises a `UserError` if a server cannot listen there."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is not a port; pass a number from 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(port) from error
        raise UserError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from error


def port_in_use(port: int) -> UserError:
    return UserError(
        f"port {port} is in use; pass --port" if port else "no port from 7860 to 7959 is free; pass --port"
    )
