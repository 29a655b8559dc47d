"""What ``make test-cuda`` runs on V2, here in Triton's interpreter; without a device it skips that.

The engines are those of the report, through the same code.
"""

from __future__ import annotations

import pytest

from tests.cuda import device
from tests.cuda.machine import look_around
from tests.cuda.runs import Effort, Models, Runs
from tests.cuda.text import compare
from tests.cuda.verdicts import SkippedError
from tests.tiny_models import TinyModels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_processes")]
EFFORT = Effort(sizes=(), rounds=1, draft_steps=1, seconds=600.0)


@pytest.fixture
def runs(tiny_pair: TinyModels) -> Runs:
    machine = look_around()
    assert not machine.lacks_v2
    models = Models(str(tiny_pair.target), str(tiny_pair.near), None)
    return Runs(machine, models, EFFORT, print)


def test_the_engine_on_v2_answers_as_plain_v2_and_its_waits_are_counted(runs: Runs) -> None:
    plain = runs._engine("plain vLLM on V2, exact", runs._exact(None, "1"))
    found = runs.ssd_exact_on_v2()
    assert plain.runner == found.runner == "V2"
    assert compare(plain, found, [])
    assert found.counters["tokens_accepted"] > 0
    with pytest.raises(SkippedError, match=device.NO_DEVICE) as skipped:
        device.check_syncs_on_v2(runs)
    assert found.waited is not None
    assert skipped.value.figures[0].startswith(f"{found.waited.steps} steps: ours 0")
