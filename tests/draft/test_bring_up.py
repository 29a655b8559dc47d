"""A model that cannot compute a step does not come up."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ssd.draft.bring_up import try_step
from vllm_ssd.draft.model import BlockChanges, Choices, Done, Sequences

NULL_BLOCK = 0
"""vLLM's, which no text has."""


class Model:
    """Records its steps; or fails in each, as where vLLM has no kernel."""

    lookahead = False
    graph_steps = 0

    def __init__(self, fails: bool) -> None:
        self.steps: list[tuple[BlockChanges, Sequences]] = []
        self._fails = fails

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Done:
        """One step."""
        if self._fails:
            raise RuntimeError("no kernel for float32")
        self.steps.append((changes, sequences))
        return Done(Choices.firsts(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)))


def test_the_first_step_touches_no_block_of_a_text() -> None:
    model = Model(fails=False)
    try_step(model)
    ((changes, sequences),) = model.steps
    assert not len(changes.sources)
    assert changes.blocks.tolist() == [NULL_BLOCK]
    assert sequences.query_lens.tolist() == [1]
    assert sequences.positions.tolist() == [0]


def test_a_step_that_fails_ends_the_start() -> None:
    with pytest.raises(RuntimeError, match="no kernel"):
        try_step(Model(fails=True))
