"""Streamed input: a request whose text goes on with what its client sends next."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.engine.harness import Engine, difference, prompt
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import running
from vllm_ssd.metrics import by_source

pytestmark = pytest.mark.slow

TOKENS = 14
TURNS: list[list[list[int]]] = [
    [prompt(9), prompt(5, 1)[1:], prompt(40, 2)[1:]],
    [prompt(70, 3), prompt(3, 4)[1:], prompt(90, 5)[1:]],
]
"""What two clients send, turn by turn."""


def converse(engine: Engine, clients: Sequence[Sequence[Sequence[int]]], ahead: bool) -> list[Any]:
    """What an engine writes to each client, all turns one after the other.

    Args:
        engine: an engine in this process.
        clients: what each sends.
        ahead: all is sent at once; else each turn when the one before is answered.
    """
    llm = engine.llm.llm_engine
    params = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    ids = [f"{id(clients)}-{ahead}-{client}" for client in range(len(clients))]
    written: dict[str, list[int]] = {req_id: [] for req_id in ids}
    sent = dict.fromkeys(ids, 0)

    def send(req_id: str, tokens: Sequence[int], more: bool) -> None:
        # As AsyncLLM does (v1/engine/async_llm.py).
        text: Any = {"prompt_token_ids": list(tokens)}
        request = llm.input_processor.process_inputs(
            req_id, text, params, supported_tasks=llm.get_supported_tasks(), resumable=more
        )
        request.external_req_id = req_id
        llm.output_processor.add_request(request, None, None, 0)
        # Both prolong the prompt, and expect to be in two processes.
        llm.engine_core.add_request(deepcopy(request))

    steps = 0
    while llm.has_unfinished_requests() or not steps:
        for req_id, turns in zip(ids, clients, strict=True):
            while sent[req_id] <= len(turns) and (
                ahead or len(written[req_id]) >= TOKENS * sent[req_id]
            ):
                at = sent[req_id]
                send(req_id, turns[at] if at < len(turns) else [0], more=at < len(turns))
                sent[req_id] += 1
        for output in llm.step():
            written[output.request_id] += output.outputs[0].token_ids
        steps += 1
        assert steps < 2000
    return list(written.values())


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in turn"])
def test_what_is_written_is_what_plain_v2_writes(
    tiny_pair: TinyModels, asynchronous: bool, ahead: bool
) -> None:
    with running(tiny_pair, None, asynchronous=False) as plain:
        expected = converse(plain, TURNS, ahead)
    assert [len(written) for written in expected] == [TOKENS * len(turns) for turns in TURNS]
    with running(tiny_pair, "itself", asynchronous) as engine:
        before = engine.stats()
        assert converse(engine, TURNS, ahead) == expected
        grown = difference(engine.stats(), before)
    assert grown["first_look_ups"] == sum(map(len, TURNS))
    by = by_source(grown)
    assert by["accepted_branch"] > 0.9 * by["drafted_branch"] > 0
    assert grown["errors"] == grown["texts_lost"] == grown["misses_cannot_draft"] == 0
