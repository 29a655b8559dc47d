"""What an engine orders of Ray, and what the draft's actor tells: plain values that Ray pickles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_ssd.wire.address import TCPAddress
from vllm_ssd.wire.keys import Key
from vllm_ssd.wire.messages import Setup


@dataclass(frozen=True)
class Order:
    """A draft server, as the engine that asks for it first describes it."""

    setup: Setup
    """The model, and what it must be able to do."""
    vocabulary: str
    """A hash of the vocabulary that targets must have; empty if only one engine joins."""
    on_cpu: bool
    threads: int
    """On CPU; 0 for no limit."""
    cores: tuple[int, ...]
    """Of its node; empty for wherever the system puts it."""
    kv_cache_bytes: int
    """0 for the default of the node it comes to."""
    useful_kv_bytes: int
    """A KV cache that its requests can fill."""
    linger_s: float | None
    """It ends when it has had no target for so many seconds; None: never."""

    @property
    def model(self) -> str:
        """A folder or hub name."""
        return str(self.setup.engine_args["model"])


class Whereabouts(NamedTuple):
    """What the actor tells."""

    model: str
    address: TCPAddress | None
    """None until its server is up."""
    key: Key
    """Drawn for this actor; it travels over Ray alone."""
    failure: str
    """Why there will be no server; empty while that is not known."""
