"""The engine's process ends if the one that has started it is gone.

If that one was killed, vLLM 0.32's engine process waits for requests for ever, with its workers,
their memory, and our draft.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading

import psutil

from vllm_ssd.hooks import ENGINE_TITLE

logger = logging.getLogger("vllm.vllm_ssd")


def end_when_orphaned() -> None:
    """Watch what has started the engine's process, if the engine has one of its own.

    A worker runs in the engine's process or is its child. An engine that runs in its caller's
    process needs no watch. Needs ``pidfd_open`` (Linux).
    """
    here = psutil.Process()
    engine = next((each for each in (here, here.parent()) if _is_engine(each)), None)
    if engine is None or not hasattr(os, "pidfd_open"):
        return
    parent = engine.ppid()
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        _end(engine)
        return
    except OSError as error:  # refused by the system, or not visible in this container
        logger.debug("ssd: what has started the engine cannot be watched: %s", error)
        return
    threading.Thread(
        target=_watch, args=(descriptor, parent, engine), name="ssd-orphaned", daemon=True
    ).start()


def _is_engine(process: psutil.Process | None) -> bool:
    try:
        return process is not None and ENGINE_TITLE in "".join(process.cmdline()[:1])
    except psutil.Error:  # it has ended, or belongs to somebody else
        return False


def _watch(descriptor: int, parent: int, engine: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # the engine has ended first
        # Another process may have got the number of a parent that was gone already.
        if engine.ppid() == parent:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
        _end(engine)
    os.close(descriptor)


def _end(engine: psutil.Process) -> None:
    logger.warning("ssd: the process that started the engine is gone; the engine ends")
    engine.terminate()
