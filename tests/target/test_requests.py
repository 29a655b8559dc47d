"""The message that announces a request to the draft."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import SamplingType, StructuredOutputsParams

from tests.tiny_models import EOS
from vllm_ssd.target.requests import RequestTable, can_draft, end_tokens, may_sample, most_drafts
from vllm_ssd.wire.messages import MAX_STOP_TOKENS
from vllm_ssd.wire.packing import unpack

MAX_LENGTH = 100
PROMPT = [5, 6, 7, 8]


def parameters(**options: Any) -> SamplingParams:
    """Sampling parameters as a worker sees them: with the model's end token filled in."""
    chosen = SamplingParams(**options)
    chosen.update_from_generation_config({}, EOS)
    return chosen


def test_a_request_is_announced_with_its_text_and_a_handle_of_its_own() -> None:
    table = RequestTable(MAX_LENGTH)
    first = table.announce("a", PROMPT, 4, parameters(max_tokens=10))
    second = table.announce("b", PROMPT, 4, parameters(max_tokens=10))
    assert unpack(first.tokens).tolist() == PROMPT
    assert first.handle != second.handle
    known = table.get("a")
    assert known is not None
    assert (known.handle, known.length, known.resynced) == (first.handle, 4, False)


def test_a_request_announced_again_gets_a_new_handle() -> None:
    table = RequestTable(MAX_LENGTH)
    before = table.announce("a", PROMPT, 4, parameters(max_tokens=10)).handle
    forgotten = table.forget("a")
    assert forgotten is not None
    assert forgotten.handle == before
    assert table.announce("a", PROMPT, 4, parameters(max_tokens=10)).handle != before


def test_a_request_announced_while_it_is_running_is_a_resync() -> None:
    table = RequestTable(MAX_LENGTH)
    start = table.announce("a", [*PROMPT, 1, 2], 4, parameters(max_tokens=10))
    known = table.get("a")
    assert known is not None
    assert known.resynced
    # max_tokens counts from the prompt's end, not from where the request is announced.
    assert start.limit == 4 + 10 - 1


def test_a_new_epoch_forgets_all_requests() -> None:
    table = RequestTable(MAX_LENGTH)
    table.announce("a", PROMPT, 4, parameters(max_tokens=10))
    table.forget_all()
    assert table.get("a") is None


@pytest.mark.parametrize(
    ("max_tokens", "limit"),
    [
        (1, 4),  # the only token comes from the target
        (10, 13),
        (96, 99),  # ends with the model's length
        (500, 99),
        (None, 99),
    ],
)
def test_no_token_is_drafted_that_the_target_must_emit_itself(
    max_tokens: int | None, limit: int
) -> None:
    table = RequestTable(MAX_LENGTH)
    assert table.announce("a", PROMPT, 4, parameters(max_tokens=max_tokens)).limit == limit


def test_the_end_token_and_the_stop_tokens_end_a_request() -> None:
    assert end_tokens(parameters()) == [EOS]
    assert end_tokens(parameters(stop_token_ids=[9, 11])) == [EOS, 9, 11]


def test_an_ignored_end_token_does_not() -> None:
    assert end_tokens(parameters(ignore_eos=True)) == []
    assert end_tokens(parameters(ignore_eos=True, stop_token_ids=[9])) == [9]


@pytest.mark.parametrize(
    ("length", "most"),
    # vLLM's mask is still right for the bonus token after this many drafts.
    [(5, 4), (6, 3), (7, 2), (8, 1), (9, 0), (10, 4), (17, 2), (19, 0)],
)
def test_no_verification_crosses_the_length_from_which_a_request_may_end(
    length: int, most: int
) -> None:
    table = RequestTable(MAX_LENGTH)
    # Neither length counts a prompt of four tokens: the text may end from 10 on, and does at 20.
    table.announce("a", PROMPT, 4, parameters(max_tokens=16, min_tokens=6))
    tracked = table.get("a")
    assert tracked is not None
    assert most_drafts(tracked, length, depth=4) == most


SAMPLED_FROM = 16


def announced(sampled_from: int = SAMPLED_FROM, **options: Any) -> tuple[float, int, float]:
    """Temperature, top-k and top-p with which drafts of a request may be sampled."""
    table = RequestTable(MAX_LENGTH, sampled_from)
    start = table.announce("a", PROMPT, 4, parameters(**options))
    return start.temperature, start.top_k, start.top_p


def test_the_draft_samples_as_the_target_does() -> None:
    assert announced(temperature=0.7, top_k=5, top_p=0.9) == (0.7, 5, 0.9)


@pytest.mark.parametrize("top_k", [0, -1, SAMPLED_FROM, 512, 1 << 40])
def test_no_top_k_is_one_of_as_many_tokens_as_there_are(top_k: int) -> None:
    assert announced(temperature=1.0, top_k=top_k) == (1.0, 0, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
        {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="a")},
        {"temperature": 1.0, "stop_token_ids": list(range(10, 10 + MAX_STOP_TOKENS))},  # and eos
        {"temperature": 1.0, "sampled_from": 0},
    ],
    ids=["greedy", "greedy with others", "grammar", "end tokens", "draft_sampling"],
)
def test_drafts_are_first_choices(options: dict[str, Any]) -> None:
    assert announced(**options) == (0.0, 0, 1.0)


def test_drafts_are_sampled_if_the_draft_checks_all_end_tokens() -> None:
    stop = list(range(10, 9 + MAX_STOP_TOKENS))
    assert announced(temperature=1.0, stop_token_ids=stop, min_tokens=3)[0] == 1.0
    stop.append(9)
    assert announced(temperature=1.0, stop_token_ids=stop, ignore_eos=True)[0] == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 0.9e-5, 1.1e-5, 1e-3, 0.01, 1.0, 2.0])
def test_what_vllm_takes_as_greedy_is_not_sampled(temperature: float) -> None:
    chosen = parameters()
    chosen.temperature = temperature  # the constructor would raise small ones
    assert may_sample(chosen, []) == (chosen.sampling_type != SamplingType.GREEDY)


def request(**changes: Any) -> Any:
    """A request of vLLM's as far as it matters here."""
    plain: dict[str, Any] = {
        "prompt_token_ids": PROMPT,
        "prompt_embeds": None,
        "mm_features": [],
        "lora_request": None,
        "sampling_params": parameters(),
    }
    return SimpleNamespace(**{**plain, **changes})


def test_plain_text_can_be_drafted_for() -> None:
    assert can_draft(request())


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": None, "prompt_embeds": object()},
        {"mm_features": [object()]},
        {"lora_request": object()},
        {"sampling_params": None},
    ],
    ids=["embeddings", "multimodal", "adapter", "pooling"],
)
def test_what_is_not_plain_text_is_left_to_the_target(changes: dict[str, Any]) -> None:
    assert not can_draft(request(**changes))
