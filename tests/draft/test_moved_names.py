"""A vLLM that lacks what the draft uses: the draft process reports it to the target."""

from __future__ import annotations

import socket

import pytest

from tests.tiny_models import TinyModels
from vllm_ssd.draft.server import DraftServer
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import DraftBound, Failed, Setup, TargetBound


def test_what_is_missing_is_reported_by_name(
    monkeypatch: pytest.MonkeyPatch, tiny_pair: TinyModels
) -> None:
    from vllm.v1.core.block_pool import BlockPool

    monkeypatch.delattr(BlockPool, "touch")
    ours, theirs = socket.socketpair()
    target: Channel[TargetBound] = Channel(ours, TargetBound)
    setup = Setup(
        engine_args={
            "model": str(tiny_pair.draft),
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
        },
        num_speculative_tokens=3,
        max_branches=4,
        enable_prefix_caching=True,
        vocab_size=512,
    )
    target.send(DraftBound(0, 0, [setup]))
    ours.shutdown(socket.SHUT_WR)  # the target is gone, but hears what is still said
    DraftServer().serve(Channel(theirs, DraftBound))
    said = [message for frame in target.receive(1.0) if frame for message in frame.messages]
    target.close()
    (answer,) = [message for message in said if isinstance(message, Failed)]
    assert "vllm.v1.core.block_pool.BlockPool.touch" in answer.reason
