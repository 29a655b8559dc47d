"""A draft that knows few of the target's tokens proposes those, and the text is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import LONG_WAIT_MS, Job, Pair, Spec, greedy, prompt
from tests.tiny_models import EOS, VOCABULARY


@pytest.mark.slow  # the shipped draft's test goes the same way
def test_only_listed_tokens_are_drafted_and_the_text_is_the_targets(
    start_pair: Callable[[Spec], Pair], tmp_path: Path
) -> None:
    ids = np.random.default_rng(3).permutation(VOCABULARY)[:400].tolist()
    file = tmp_path / "tokens.txt"
    file.write_text("\n".join(map(str, ids)))
    pair = start_pair(Spec("itself", 4, {"max_wait_ms": LONG_WAIT_MS, "draft_vocab": str(file)}))
    proposed = _watch_proposals(pair)
    # Text that may end early: the end token can be drafted.
    jobs = [Job(prompt(10 + 7 * i, i), greedy(80, ignore_eos=i % 2 == 0)) for i in range(10)]
    stats = pair.check_identical(jobs)
    assert stats["hits"] > 0
    assert 0 < stats["tokens_accepted"] < stats["tokens_drafted"]
    assert proposed
    assert proposed <= {*ids, EOS}
    # Most tokens of the list come up: it is the list that limits, not chance.
    assert len(proposed) > 100


def _watch_proposals(pair: Pair) -> set[int]:
    """The tokens that are proposed from now on."""
    core = pair.ssd.llm.llm_engine.engine_core
    drafter: Any = core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    propose = drafter.propose
    proposed: set[int] = set()

    def watch(*arguments: Any, **named: Any) -> Sequence[Sequence[int]]:
        drafts: Sequence[Sequence[int]] = propose(*arguments, **named)
        proposed.update(token for draft in drafts for token in draft)
        return drafts

    drafter.propose = watch
    return proposed
