"""Servers to connect to, over each transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire.serving import EchoServer
from vllm_ssd.wire.address import TCPAddress, UnixAddress
from vllm_ssd.wire.keys import new_key
from vllm_ssd.wire.listener import Listener


@pytest.fixture
def tls_server() -> Iterator[EchoServer]:
    """On a TCP port of the loopback interface."""
    key = new_key()
    with EchoServer(Listener(TCPAddress("127.0.0.1", 0), key), key) as server:
        yield server


@pytest.fixture
def unix_server(tmp_path: Path) -> Iterator[EchoServer]:
    """On a Unix socket."""
    with EchoServer(Listener(UnixAddress(str(tmp_path / "s")), None), None) as server:
        yield server


@pytest.fixture(params=["unix", "tls"])
def server(request: pytest.FixtureRequest) -> EchoServer:
    """On each of the two."""
    served: EchoServer = request.getfixturevalue(f"{request.param}_server")
    return served
