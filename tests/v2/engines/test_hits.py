"""With the target as its draft, and time enough, nearly all look-ups hit.

The host is kept a step behind, as it is on a device: a step's outcome reaches the draft's thread
while the next step is running.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import pytest

from tests.engine.harness import Engine, Job, greedy, prompt
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import answers, drafts_of, runner_of, running

pytestmark = pytest.mark.slow

STEP_SECONDS = 0.15
"""A step takes so much longer: time for the draft to make all branches."""
LATE_SECONDS = 0.02
"""So late an outcome comes, when the next step has begun."""
WANTED = 0.98


class LateReadback:
    """Delivers in order, and late, what the readback of an engine has; ends with it."""

    def __init__(self, engine: Engine) -> None:
        readback = drafts_of(engine).readback
        self._deliver, self._close = readback._deliver, readback.close
        self._waiting: queue.SimpleQueue[tuple[float, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        readback._deliver = lambda *outcome: self._put(lambda: self._deliver(*outcome))
        readback.then = self._put
        readback.close = self._end

    def _put(self, call: Any) -> None:
        self._waiting.put((time.monotonic() + LATE_SECONDS, call))

    def _run(self) -> None:
        while (each := self._waiting.get()) is not None:
            due, call = each
            time.sleep(max(0.0, due - time.monotonic()))
            call()

    def _end(self) -> None:
        self._waiting.put(None)
        self._thread.join()
        self._close()


def slow_down(engine: Engine) -> None:
    """The target takes longer for each step."""
    runner = runner_of(engine)
    execute = runner.execute_model

    def slowly(*arguments: Any, **named: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return execute(*arguments, **named)

    runner.execute_model = slowly


def test_the_target_as_its_own_draft_hits(tiny_pair: TinyModels, asynchronous: bool) -> None:
    jobs = [Job(prompt(10 + 7 * i, i), greedy(120), arrives=3 * i) for i in range(6)]
    with running(tiny_pair, None, asynchronous=False) as plain:
        expected = plain.run(jobs)
    with running(tiny_pair, "itself", asynchronous) as engine:
        slow_down(engine)
        LateReadback(engine)
        answered, grown = answers(engine, jobs)
    print({name: value for name, value in grown.items() if value})
    assert answered == expected
    # All look-ups, those right after the prompts as well.
    assert grown["look_ups"] > 150
    assert grown["hits"] > WANTED * grown["look_ups"]
    assert grown["accepted_branch"] > WANTED * grown["drafted_branch"]
