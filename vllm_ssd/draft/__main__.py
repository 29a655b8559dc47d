"""``python -m vllm_ssd.draft``: the draft process. Started by the target's worker only."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

from vllm_ssd.parent import die_with


def main() -> None:
    """Tie this process to its parent, then serve it over the inherited socket."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the target")
    parser.add_argument("--cores", help="comma-separated cores to run on")
    options = parser.parse_args()

    die_with(options.parent)
    # Ctrl-C goes to the whole foreground group; the target decides when the draft ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if options.cores:
        os.sched_setaffinity(0, [int(core) for core in options.cores.split(",")])

    import setproctitle

    setproctitle.setproctitle("vllm_ssd draft")

    # Heavy imports only now, with the affinity set: OpenMP reads it once.
    from vllm_ssd.draft.server import DraftServer
    from vllm_ssd.wire.channel import Channel
    from vllm_ssd.wire.messages import DraftBound

    connection = socket.socket(fileno=options.fd)
    DraftServer().serve(Channel(connection, DraftBound))
    # Without the interpreter's shutdown: the engine holds threads and compiled code.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
