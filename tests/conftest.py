"""No test reaches beyond this machine: model hubs are told so, and sockets refuse to."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

# Read when huggingface_hub is first imported, so it has to be set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

_LOOPBACK = {"localhost", "127.0.0.1", "::1", "", None}


def _refuse(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _LOOPBACK and not str(name).startswith("127."):
        raise RuntimeError(f"a test tried to reach {name!r}; tests run offline")


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Let sockets reach this machine only: Unix domain sockets and the loopback address."""
    connect, connect_ex, sendto = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.socket.sendto,
    )

    def guard(method: Callable[..., object]) -> Callable[..., object]:
        def guarded(sock: socket.socket, *arguments: object) -> object:
            # The address comes last, in `sendto` as well.
            if sock.family != getattr(socket, "AF_UNIX", None):
                address = arguments[-1]
                _refuse(address[0] if isinstance(address, tuple) else address)
            return method(sock, *arguments)

        return guarded

    lookup = socket.getaddrinfo

    def guarded_lookup(host: object, *arguments: object, **options: object) -> object:
        _refuse(host)
        return lookup(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(connect))
        patch.setattr(socket.socket, "connect_ex", guard(connect_ex))
        patch.setattr(socket.socket, "sendto", guard(sendto))
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield
