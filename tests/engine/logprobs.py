"""Whether two engines state the same logprobs."""

from __future__ import annotations

from typing import Any

import pytest

LOGPROBS_AGREE = 1e-3
"""Float32 sums in another order differ by less."""


def check_logprobs(wanted: Any, found: Any) -> None:
    """Fail where the logprobs or ranks of a text's tokens differ; either may be ``None``."""
    if wanted is None:
        assert found is None
        return
    for want, have in zip(wanted, found, strict=True):
        assert (want is None) == (have is None)
        for token, logprob in (want or {}).items():
            assert have[token].logprob == pytest.approx(logprob.logprob, abs=LOGPROBS_AGREE)
            assert have[token].rank == logprob.rank
