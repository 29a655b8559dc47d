"""The key that a target and a draft server share over TCP, and the certificate made from it.

A key is 32 random bytes. Its file holds 64 hexadecimal digits in one line and is its owner's alone.
A server shows its certificate to whoever asks, which tells nothing about a key that was drawn by
chance, and would let a password be guessed: hence a key.
"""

from __future__ import annotations

import datetime
import os
import re
import secrets
import shlex
import stat
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

KEY_BYTES = 32
_CONTEXT = b"vllm-ssd draft server, protocol 1"
"""With another protocol, the same key is another identity: the two do not talk to each other."""
_SERIAL = 1
# So wide that a machine whose clock is wrong is let in as well.
_NOT_BEFORE = datetime.datetime(2000, 1, 1)
_NOT_AFTER = datetime.datetime(2100, 1, 1)
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Key:
    """The shared secret; it is not printed.

    Raises:
        ValueError: it is not of 32 bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key of {len(self.secret)} bytes: it has {KEY_BYTES}")


@dataclass(frozen=True)
class Identity:
    """What an end of the connection shows of its key; both have the same."""

    certificate: bytes
    """DER."""
    pem: bytes = field(repr=False)
    """The private key and the certificate."""


def new_key() -> Key:
    """A random key."""
    return Key(secrets.token_bytes(KEY_BYTES))


def write_key(path: str | os.PathLike[str]) -> Key:
    """Write a new key to a new file that only its owner can read.

    Raises:
        FileExistsError: there is such a file; it is left as it is.
        OSError: it cannot be written.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FileExistsError(f"{path} is there already: remove it for a new key") from None
    key = new_key()
    with open(file, "w", encoding="ascii") as text:
        text.write(key.secret.hex() + "\n")
    return key


def read_key(path: str | os.PathLike[str]) -> Key:
    """The key in a file.

    Raises:
        ValueError: the file is missing or open to others, or holds no key; the message names the
            file and the mend, and nothing of what it holds.
    """
    form = f"a key is {2 * KEY_BYTES} hexadecimal digits in one line"
    quoted = shlex.quote(os.fspath(path))
    make = f"make one: vllm-ssd draft-key {quoted}"
    try:
        # A pipe would keep us waiting for a writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ValueError(f"key file {path}: there is none; {make}") from None
    except OSError as error:
        raise ValueError(f"key file {path}: {error.strerror}") from None
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"key file {path}: not a file; {make}")
        if mode & _OTHERS:
            raise ValueError(
                f"key file {path}: mode {stat.S_IMODE(mode):04o} lets others at it; "
                f"chmod 600 {quoted}, and make a new key if others may have read this one"
            )
        text = os.read(file, 2 * KEY_BYTES + 2).removesuffix(b"\n")
    finally:
        os.close(file)
    if len(text) < 2 * KEY_BYTES:
        raise ValueError(f"key file {path}: only {len(text)} characters, {form}; {make}")
    if not re.fullmatch(rb"[0-9A-Fa-f]{%d}" % (2 * KEY_BYTES), text):
        raise ValueError(f"key file {path}: {form}, and nothing else; {make}")
    return Key(bytes.fromhex(text.decode()))


def identity(key: Key) -> Identity:
    """The certificate that stands for a key: whoever has the key makes the same one."""
    derived = HKDF(hashes.SHA256(), length=32, salt=None, info=_CONTEXT).derive(key.secret)
    private_key = Ed25519PrivateKey.from_private_bytes(derived)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vllm-ssd")])
    builder = x509.CertificateBuilder(name, name, private_key.public_key(), _SERIAL)
    builder = builder.not_valid_before(_NOT_BEFORE).not_valid_after(_NOT_AFTER)
    certificate = builder.sign(private_key, None)  # Ed25519 signs without chance
    encoding = serialization.Encoding
    secret = private_key.private_bytes(
        encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(
        certificate.public_bytes(encoding.DER), secret + certificate.public_bytes(encoding.PEM)
    )
