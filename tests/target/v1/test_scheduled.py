"""What the shared part is told of a step of vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams

from vllm_ssd.target.steps import Decodes, EngineRequest
from vllm_ssd.target.v1.scheduled import described, scheduled

PROMPT = [5, 6, 7, 8]
PARAMETERS = SamplingParams(max_tokens=20)


def new_request(req_id: str, **others: Any) -> SimpleNamespace:
    """A request as the scheduler describes it."""
    plain: dict[str, Any] = {
        "prompt_token_ids": PROMPT,
        "prompt_embeds": None,
        "mm_features": [],
        "lora_request": None,
        "sampling_params": PARAMETERS,
    }
    return SimpleNamespace(req_id=req_id, **{**plain, **others})


def step(
    new: tuple[SimpleNamespace, ...] = (),
    finished: tuple[str, ...] = (),
    prefill: int = 0,
    **drafts: list[int],
) -> Any:
    """A step as the scheduler describes it; ``drafts``: what running requests verify."""
    counts = {req_id: len(of) + 1 for req_id, of in drafts.items()}
    counts |= {one.req_id: len(PROMPT) for one in new}
    if prefill:
        counts["prefilled"] = prefill
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=list(new),
        num_scheduled_tokens=counts,
        scheduled_spec_decode_tokens={req_id: of for req_id, of in drafts.items() if of},
    )


def test_requests_begin_and_end() -> None:
    told = scheduled(step(new=(new_request("b"),), finished=("a",)))
    assert list(told.gone) == ["a"]
    assert told.new == [EngineRequest("b", PROMPT, len(PROMPT), PARAMETERS)]


def test_a_request_that_begins_anew_and_cannot_be_followed_is_gone() -> None:
    told = scheduled(step(new=(new_request("b", lora_request=object()), new_request("c"))))
    assert list(told.gone) == ["b"]
    assert [new.req_id for new in told.new] == ["c"]


def test_placeholders_are_not_verified() -> None:
    told = scheduled(step(a=[1, -1, -1], b=[1, 2, 3, 3], c=[], d=[-1]))
    assert dict(told.verified) == {"a": 1, "b": 4, "c": 0, "d": 0}


def test_a_step_is_measured_if_every_request_decodes() -> None:
    assert scheduled(step(a=[1, 2], b=[])).decodes == Decodes(requests=2, drafted=2)
    assert scheduled(step(a=[1, 2], prefill=5)).decodes is None
    assert scheduled(step(new=(new_request("b"),), a=[1])).decodes is None
    assert scheduled(step()).decodes is None


def test_a_running_request_is_described_by_its_whole_text() -> None:
    text = [*PROMPT, 9, 9]
    state = new_request("", num_prompt_tokens=len(PROMPT))
    assert described(state, "a", text) == EngineRequest("a", text, len(PROMPT), PARAMETERS)
    state.prompt_embeds = object()
    assert described(state, "a", text) is None
