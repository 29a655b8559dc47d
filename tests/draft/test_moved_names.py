"""A vLLM that lacks what the draft uses: the draft process reports it to the target."""

from __future__ import annotations

import msgspec
import pytest

from tests.tiny_models import TinyModels
from vllm_ssd.draft.server import DraftServer
from vllm_ssd.wire.channel import ChannelClosedError
from vllm_ssd.wire.messages import DraftBound, Failed, Setup, ToDraft


class Line:
    """A channel over which the target has sent one frame, and is then gone."""

    def __init__(self, *messages: ToDraft) -> None:
        self._frames = [DraftBound(0, 0, list(messages))]
        self.answers: list[msgspec.Struct] = []

    def receive(self, timeout: float | None) -> list[DraftBound]:
        if not self._frames:
            raise ChannelClosedError
        frames, self._frames = self._frames, []
        return frames

    def send(self, frame: msgspec.Struct) -> None:
        self.answers += frame.messages  # type: ignore[attr-defined]

    def close(self) -> None: ...


def test_what_is_missing_is_reported_by_name(
    monkeypatch: pytest.MonkeyPatch, tiny_pair: TinyModels
) -> None:
    from vllm.v1.core.block_pool import BlockPool

    monkeypatch.delattr(BlockPool, "touch")
    line = Line(
        Setup(
            engine_args={
                "model": str(tiny_pair.draft),
                "max_num_seqs": 8,
                "max_num_batched_tokens": 64,
            },
            num_speculative_tokens=3,
            fan_out=[],
            branches=4,
            max_branches=4,
            enable_prefix_caching=True,
            vocab_size=512,
        )
    )
    DraftServer(line).run()  # type: ignore[arg-type]
    (answer,) = [answer for answer in line.answers if isinstance(answer, Failed)]
    assert "vllm.v1.core.block_pool.BlockPool.touch" in answer.reason
