"""A draft that is the target, and has enough time, hits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.conftest import SPECS
from tests.engine.harness import Job, Pair, Spec, greedy, hit_rate_after_first, prompt

WANTED = 0.98


def test_the_target_as_its_own_draft_hits_and_is_accepted(
    start_pair: Callable[[Spec], Pair],
) -> None:
    pair = start_pair(SPECS["itself"])
    jobs = [Job(prompt(10 + 7 * i, i), greedy(150), arrives=3 * i) for i in range(12)]
    stats = pair.check_identical(jobs)
    assert hit_rate_after_first(stats) > WANTED
    assert stats["tokens_accepted"] / stats["tokens_drafted"] > WANTED
    # A verification yields all K tokens and one more, but for the end of each request.
    depth = pair.spec.depth
    assert stats["tokens_drafted"] / stats["verifications"] > 0.9 * depth


@pytest.mark.slow
def test_the_look_up_after_the_end_of_a_text_does_not_count(
    start_pair: Callable[[Spec], Pair],
) -> None:
    pair = start_pair(SPECS["near"])
    # As many end tokens as the draft checks: most answers reach one in the middle of a draft.
    params = greedy(150, stop_token_ids=list(range(5, 69, 8)))
    jobs = [Job(prompt(10 + 7 * i, i), params, arrives=3 * i) for i in range(16)]
    answers = [answer for (answer,) in pair.expected(jobs)]
    ended = [i for i, answer in enumerate(answers) if answer.finish_reason == "stop"]
    assert len(ended) >= 6
    stats = pair.check_identical([jobs[i] for i in ended])
    verifications = sum(len(answers[i].tokens) for i in ended) - stats["tokens_accepted"]
    assert stats["look_ups"] == verifications - len(ended)
