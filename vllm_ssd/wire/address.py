"""Where a draft server listens: ``unix:PATH`` or ``tcp://HOST:PORT``."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

_SPELLING = "an address is unix:/absolute/path or tcp://HOST:PORT (IPv6: tcp://[::1]:5000)"
_TCP = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[^\[\]:]*)):(?P<port>[0-9]{1,5})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?", re.ASCII)
_MAX_PATH_BYTES = 107
"""What a Unix address holds."""
_MAX_NAME = 253
_MAX_PORT = 65535


@dataclass(frozen=True)
class UnixAddress:
    """The path of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TCPAddress:
    """A host, by name or number, and a port; 0 is any free one to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


Address = UnixAddress | TCPAddress


def parse_address(text: str) -> Address:
    """The address that ``text`` spells.

    Raises:
        ValueError: it spells none; the message names it and what is wrong with it.
    """
    if text.startswith("unix:"):
        return _unix(text)
    if text.startswith("tcp://"):
        return _tcp(text)
    raise ValueError(f"{text!r}: {_SPELLING}")


def _unix(text: str) -> UnixAddress:
    path = text.removeprefix("unix:")
    if not os.path.isabs(path) or path.endswith("/") or "\0" in path:
        raise ValueError(f"{text!r}: the path must be absolute and name a file; {_SPELLING}")
    size = len(os.fsencode(path))
    if size > _MAX_PATH_BYTES:
        raise ValueError(
            f"{text!r}: the path has {size} bytes, a Unix socket takes {_MAX_PATH_BYTES}: "
            "choose a shorter one"
        )
    return UnixAddress(path)


def _tcp(text: str) -> TCPAddress:
    match = _TCP.fullmatch(text.removeprefix("tcp://"))
    if match is None:
        raise ValueError(f"{text!r}: {_SPELLING}")
    port = int(match["port"])
    if port > _MAX_PORT:
        raise ValueError(f"{text!r}: a port is at most {_MAX_PORT}")
    host = match["name"]
    if match["ipv6"] is not None:
        host = match["ipv6"]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"{text!r}: no IPv6 address in the brackets; {_SPELLING}") from None
    elif not _NAME.fullmatch(host) or len(host) > _MAX_NAME:
        raise ValueError(f"{text!r}: no host (0.0.0.0 listens on every IPv4 one); {_SPELLING}")
    return TCPAddress(host, port)
