"""A draft with few of the target's tokens proposes only those, and the text is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
    # Text that may end early: the end token can be drafted.
    jobs = [Job(prompt(10 + 7 * i, i), greedy(80, ignore_eos=i % 2 == 0)) for i in range(10)]
    with pair.watched_proposals() as proposed:
        stats = pair.check_identical(jobs)
    assert stats["hits"] > 0
    assert 0 < stats["tokens_accepted"] < stats["tokens_drafted"]
    assert proposed
    assert proposed <= {*ids, EOS}
    # Most tokens of the list come up: it is the list that limits, not chance.
    assert len(proposed) > 100
