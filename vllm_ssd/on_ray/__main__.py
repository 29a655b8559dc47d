"""``python -m vllm_ssd.on_ray``: the draft server of an actor. Started by the actor only."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from vllm_ssd.parent import die_with

if TYPE_CHECKING:
    from vllm_ssd.draft.server import DraftServer
    from vllm_ssd.on_ray.order import Order
    from vllm_ssd.wire.keys import Key

MOST_TARGETS = 32
FIRST_TARGET_SECONDS = 60.0
"""A server that nobody joins at all waits so long for the engine that asked for it."""
LOOK_SECONDS = 0.1
ENDING_SECONDS = 5.0
"""A server that is to end has so long for its last step."""


def main() -> None:
    """Tie this process to the actor, bring the server up, serve until nobody needs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited pipe")
    parser.add_argument("--parent", type=int, required=True, help="process id of the actor")
    options = parser.parse_args()

    die_with(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    actor = Connection(options.fd)
    order, host, key = actor.recv()
    if order.cores:
        os.sched_setaffinity(0, order.cores)

    import setproctitle

    setproctitle.setproctitle("vllm_ssd draft")
    try:
        _serve(actor, order, host, key)
    except Exception as error:  # whatever vLLM finds wrong, the engines are told
        actor.send(f"{type(error).__name__}: {error}")
    # Without the interpreter's shutdown: the engine holds threads and compiled code.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(actor: Connection, order: Order, host: str, key: Key) -> None:
    # Heavy imports only now, with the affinity set: OpenMP reads it once.
    from vllm_ssd.draft.server import DraftServer
    from vllm_ssd.serving import bring_up, kv_cache_on_cpu
    from vllm_ssd.wire.address import TCPAddress
    from vllm_ssd.wire.listener import Listener

    server = DraftServer(MOST_TARGETS)
    listener = Listener(TCPAddress(host, 0), key)
    size = order.kv_cache_bytes
    if order.on_cpu and not size:
        size = kv_cache_on_cpu(order.useful_kv_bytes)
    bring_up(server, order.setup, size, order.vocabulary)
    actor.send(listener.address)
    if order.linger_s is not None:
        arguments = server, order.linger_s
        threading.Thread(target=_stop_unneeded, args=arguments, daemon=True).start()
    server.serve_all(listener)


def _stop_unneeded(server: DraftServer, linger_s: float) -> None:
    """Stop the server when it has had no target for a while; the first may take longer to come."""
    needed_until = time.monotonic() + FIRST_TARGET_SECONDS
    while time.monotonic() < needed_until:
        time.sleep(LOOK_SECONDS)
        # A target that is here joins when it has itself come up, which can take minutes.
        if server.connections:
            needed_until = time.monotonic() + linger_s + LOOK_SECONDS
    server.stop()
    time.sleep(ENDING_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
