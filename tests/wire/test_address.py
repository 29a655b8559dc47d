"""How the address of a draft server is spelled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.wire.address import TCPAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/ssd.sock", UnixAddress("/run/ssd.sock")),
        ("unix:/tmp/a b:c", UnixAddress("/tmp/a b:c")),
        ("tcp://127.0.0.1:5000", TCPAddress("127.0.0.1", 5000)),
        ("tcp://draft-1.example.org:0", TCPAddress("draft-1.example.org", 0)),
        ("tcp://[::1]:65535", TCPAddress("::1", 65535)),
        ("tcp://[fe80::1%eth0]:1", TCPAddress("fe80::1%eth0", 1)),
    ],
)
def test_an_address_is_read_and_spelled_again(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "unix:/absolute/path or tcp://HOST:PORT"),
        ("/run/ssd.sock", "unix:/absolute/path"),
        ("127.0.0.1:5000", "tcp://HOST:PORT"),
        ("http://host:1", "tcp://HOST:PORT"),
        ("unix:", "absolute"),
        ("unix:ssd.sock", "absolute"),
        ("unix:~/ssd.sock", "absolute"),
        ("unix:/run/", "name a file"),
        ("unix:/run/a\0b", "absolute"),
        ("unix:/" + "a" * 107, "108 bytes.*shorter"),
        ("tcp://host", "HOST:PORT"),
        ("tcp://:5000", "no host"),
        ("tcp://*:5000", r"0\.0\.0\.0"),
        ("tcp://host:port", "HOST:PORT"),
        ("tcp://host:-1", "HOST:PORT"),
        ("tcp://host:65536", "at most 65535"),
        ("tcp://host:5000/", "HOST:PORT"),
        ("tcp://user@host:5000", "no host"),
        ("tcp://::1:5000", "IPv6"),
        ("tcp://[::1]", "IPv6"),
        ("tcp://[host]:1", "no IPv6 address"),
        ("tcp://host:5000\n", "HOST:PORT"),
    ],
)
def test_a_bad_address_is_refused_with_its_value_and_the_mend(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        parse_address(text)
    assert repr(text) in str(refused.value)


@given(st.one_of(st.text(), st.text().map("tcp://{}:1".format), st.text().map("unix:/{}".format)))
def test_any_text_is_an_address_that_is_spelled_so_or_a_value_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert str(address) == text or isinstance(address, TCPAddress)
    assert parse_address(str(address)) == address
