"""The fixes of vLLM's rejection sampler on CPU, by themselves and through the real sampler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from tests.engine.exact_distribution import p_value
from vllm_ssd.target.v1.rejection import (
    RejectionSampler,
    expand_batch_to_tokens,
    fix_cpu_rejection_sampler,
    recovered,
)

needs_the_fix = pytest.mark.skipif(
    HAS_TRITON or not current_platform.is_cpu(), reason="not where Triton runs the sampler"
)


@pytest.fixture
def _in_a_worker() -> None:
    """Kernels as every vLLM worker has them before the fix."""
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    fix_cpu_rejection_sampler()


@given(
    st.lists(st.tuples(st.integers(-2, 5), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(-2, 5),
    st.integers(-2, 5),
)
def test_each_requests_value_stands_at_each_of_its_tokens(
    requests: list[tuple[int, int]], replace_from: int, replace_to: int
) -> None:
    values = torch.tensor([value for value, _ in requests])
    counts = torch.tensor([count for _, count in requests])
    expanded = expand_batch_to_tokens(
        values, counts.cumsum(0).to(torch.int32), int(counts.sum()), replace_from, replace_to
    )
    replaced = [replace_to if value == replace_from else value for value, _ in requests]
    by_hand = [v for v, (_, count) in zip(replaced, requests, strict=True) for _ in range(count)]
    assert expanded.tolist() == by_hand


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_expanding_keeps_the_type(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 0, 3]).to(dtype)
    counts = torch.tensor([2, 3, 3], dtype=torch.int32)
    expanded = expand_batch_to_tokens(values, counts, 3, replace_from=0, replace_to=1)
    assert expanded.dtype == dtype
    assert expanded.tolist() == [1, 1, 1]


def metadata(drafts: list[list[int]]) -> SpecDecodeMetadata:
    return SpecDecodeMetadata.make_dummy(drafts, device=torch.device("cpu"))


def chance(temperatures: list[float], generators: dict[int, Any] | None = None) -> SimpleNamespace:
    """What the sampler reads of vLLM's sampling metadata."""
    greedy = [temperature == 0.0 for temperature in temperatures]
    return SimpleNamespace(
        all_greedy=all(greedy),
        all_random=not any(greedy),
        temperature=torch.tensor(temperatures),
        generators=generators or {},
        top_k=None,
        top_p=None,
    )


def verify(
    drafts: list[list[int]],
    p: torch.Tensor,
    q: torch.Tensor | None = None,
    temperatures: list[float] | None = None,
    generators: dict[int, Any] | None = None,
    bonus: int = 4,
) -> list[list[int]]:
    """Run vLLM's function, as it is called in a worker.

    Args:
        drafts: of each request.
        p: ``[vocabulary]``, the target's distribution at every position.
        q: ``[vocabulary]``, what all drafts were sampled from.
        temperatures: of the requests; default 1.
        generators: of those that have their own.
        bonus: every request's.
    """
    made = metadata(drafts)
    total = sum(map(len, drafts))
    output = rejection_sampler.rejection_sample(
        made.draft_token_ids,
        made.num_draft_tokens,
        made.max_spec_len,
        made.cu_num_draft_tokens,
        None if q is None else q.repeat(total, 1),
        p.log().repeat(total, 1),
        torch.full((len(drafts), 1), bonus),
        chance(temperatures or [1.0] * len(drafts), generators),
    )
    tokens: list[list[int]] = rejection_sampler.RejectionSampler.parse_output(output, len(p))[0]
    return tokens


CERTAIN = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
P = torch.tensor([0.05, 0.15, 0.4, 0.3, 0.1])
Q = torch.tensor([0.5, 0.1, 0.1, 0.3, 0.0])
MANY = 40_000


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_drafts_are_accepted_up_to_the_first_that_is_impossible() -> None:
    drafts = [[3, 3], [3, 0, 3], [0], [], [3, 3, 3, 3]]
    assert verify(drafts, CERTAIN) == [[3, 3, 4], [3, 3], [3], [4], [3, 3, 3, 3, 4]]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
@pytest.mark.parametrize("q", [None, CERTAIN], ids=["certain", "sampled"])
def test_a_placeholder_is_rejected(q: torch.Tensor | None) -> None:
    # Token -1 would read the last probability of the row before it: here a certain one.
    p = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    assert verify([[-1, -1], [4, -1], [-1]], p) == [[4], [4, 4], [4]]
    assert verify([[3, -1], [-1]], CERTAIN, q) == [[3, 3], [3]]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_a_token_that_cannot_have_been_sampled_is_rejected() -> None:
    # An error of the hand-over: it costs a token, the text stays the target's.
    assert verify([[3, 3], [3]], CERTAIN, torch.zeros(5)) == [[3], [3]]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_ranks_that_reject_different_tokens_draw_as_many_numbers() -> None:
    following = []
    for drafts in ([[3, 3], [3]], [[0, 3], [0]]):
        torch.manual_seed(1)
        verify(drafts, CERTAIN)
        following.append(torch.rand(1).item())
    assert following[0] == following[1]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_greedy_requests_of_a_mixed_batch_follow_the_likeliest_token() -> None:
    drafts = [[2, 2, 1], [2], [1], []]
    greedy = verify([*drafts, [3]], P, temperatures=[0.0, 0.0, 0.0, 0.0, 1.0])[:-1]
    assert greedy == [[2, 2, 2], [2, 4], [2], [4]]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
@pytest.mark.parametrize("q", [None, Q], ids=["certain", "sampled"])
def test_the_first_token_has_the_targets_distribution(q: torch.Tensor | None) -> None:
    torch.manual_seed(5)
    drawn = torch.multinomial(Q, MANY, replacement=True)[:, None].tolist()
    first = [tokens[0] for tokens in verify(drawn, P, q)]
    assert p_value(first, P) > 0.001
    # Such a comparison would find a q' that is not the one drawn from.
    assert p_value([tokens[0] for tokens in verify(drawn, P, P)], P) < 1e-9


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_rejected_where_p_is_q_a_token_is_drawn_from_p() -> None:
    # 1e-9 of rounding makes the rest p - q' zero everywhere.
    tokens = recovered(P.repeat(MANY, 1), torch.zeros(MANY, dtype=torch.int64), P, uniform(MANY))
    assert p_value(tokens.tolist(), P) > 0.001


def uniform(count: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_token_without_a_chance_is_never_recovered() -> None:
    p = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]]).repeat(2, 1)
    drafts = torch.tensor([1, 3])
    for number in (0.0, 1.0 - 2.0**-53):
        numbers = torch.full((2,), number, dtype=torch.float64)
        assert recovered(p, drafts, None, numbers).tolist() == [3, 1]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_a_request_with_a_seed_gets_the_same_tokens_again() -> None:
    def run(seed: int) -> list[list[int]]:
        generators = {1: torch.Generator().manual_seed(seed)}
        drafts = [[0, 1, 2], [0, 1, 0, 1, 0], [2]]
        return [verify(drafts, P, Q, generators=generators)[1] for _ in range(8)]

    assert run(1) == run(1) != run(2)


class EchoingSampler(torch.nn.Module):
    """Yields what it was called with."""

    logprobs_mode = "raw_logprobs"

    def forward(
        self, logits: torch.Tensor, sampling_metadata: Any, predict_bonus_token: bool = False
    ) -> Any:
        # Else a thinking budget, which counts drafted tokens, looks at the wrong row.
        assert predict_bonus_token
        return logits, sampling_metadata


def test_a_step_without_drafts_is_sampled_as_by_plain_vllm() -> None:
    sampler = RejectionSampler(EchoingSampler())
    logits, sampling = torch.zeros(2, 5), chance([1.0, 0.0])
    assert sampler(metadata([[], []]), None, logits, sampling) == (logits, sampling)
