"""V2's engines run where the environment asks for V2, in a pytest run of their own (``make test``):
vLLM looks for Triton once a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.v2.following import Following

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from tests.v2.interpreter import prepare

    prepare()
else:
    collect_ignore = ["engines"]


@pytest.fixture
def following() -> Iterator[Following]:
    """A follower between a draft's end and the device's arrays."""
    from tests.v2.following import Following

    following = Following()
    yield following
    following.client.close()
    following.draft.dies()
