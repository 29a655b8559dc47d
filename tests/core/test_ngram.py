"""What followed the same tokens earlier is what vLLM's n-gram proposer finds."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from vllm_ssd.core.ngram import LONGEST, SHORTEST, continuation

VLLMS = f"""
import json, sys
import numpy as np
from vllm.v1.spec_decode.ngram_proposer import batch_propose_numba
found = []
for text, most in json.load(sys.stdin):
    tokens, sizes = np.zeros((1, most), np.int32), np.zeros(1, np.int32)
    texts, lengths = np.array([text], np.int32), np.array([len(text)], np.int32)
    batch_propose_numba(np.arange(1), lengths, texts, {SHORTEST}, {LONGEST}, 2**30, most, tokens,
        sizes)
    found.append(tokens[0, : sizes[0]].tolist())
print(json.dumps(found))
"""
"""In a process of its own: where Numba is imported, no engine can be started afterwards."""


@pytest.mark.slow
def test_it_finds_what_vllms_proposer_finds() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for length in [*range(1, 40), 300, 2000]:
        for vocabulary in (1, 2, 3, 8, 100):
            text = rng.integers(0, vocabulary, length).tolist()
            cases.append((text, int(rng.integers(1, 9))))
    answer = subprocess.run(
        [sys.executable, "-c", VLLMS],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = json.loads(answer.stdout.splitlines()[-1])
    found = [continuation(np.array(text, np.int32), most) for text, most in cases]
    assert found == wanted
    assert sum(map(bool, found)) > 50


def test_a_longer_match_comes_first() -> None:
    text = np.array([7, 2, 3, 9, 9, 1, 2, 3, 4, 4, 1, 2, 3], np.int32)
    assert continuation(text, 2) == [4, 4]
    assert continuation(text[1:], 9) == [4, 4, 1, 2, 3]
    assert continuation(np.array([5], np.int32), 3) == []
