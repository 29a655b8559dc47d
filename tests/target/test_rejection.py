"""The fixes of vLLM's rejection sampler on CPU, by themselves and through the real sampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample import rejection_sampler

from vllm_ssd.target.rejection import expand_batch_to_tokens, fix_cpu_rejection_sampler

needs_the_fix = pytest.mark.skipif(
    HAS_TRITON or not current_platform.is_cpu(), reason="not where Triton runs the sampler"
)
PLACEHOLDER = -1


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


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_the_fix_is_applied_only_once() -> None:
    in_place = rejection_sampler._rejection_random_sample
    fix_cpu_rejection_sampler()
    assert rejection_sampler._rejection_random_sample is in_place
    assert rejection_sampler.expand_batch_to_tokens is expand_batch_to_tokens


def verify(drafts: list[list[int]], probabilities: list[float]) -> list[list[int]]:
    """Run the sampler's kernel over requests that all have the same target distribution.

    Every draft with a chance is accepted (the uniform numbers are 0); a recovered token is 3, a
    bonus token is 4.
    """
    counts = torch.tensor([len(draft) for draft in drafts])
    longest, total = int(counts.max()), int(counts.sum())
    output = torch.full((len(drafts), longest + 1), PLACEHOLDER, dtype=torch.int32)
    rejection_sampler._rejection_random_sample(
        output,
        counts.cumsum(0).to(torch.int32),
        torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32),
        None,
        torch.tensor([probabilities] * total),
        torch.full((len(drafts), 1), 4, dtype=torch.int32),
        torch.full((total,), 3, dtype=torch.int32),
        torch.zeros(total),
        torch.zeros(len(drafts), dtype=torch.bool),
        longest,
        None,
    )
    return [[token for token in row if token != PLACEHOLDER] for row in output.tolist()]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_drafts_with_a_chance_are_accepted_by_the_real_kernel() -> None:
    assert verify([[0, 1], [2]], [0.5, 0.3, 0.2, 0.0, 0.0]) == [[0, 1, 4], [2, 4]]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_a_placeholder_is_rejected_by_the_real_kernel() -> None:
    # Token -1 would read the last probability of the row before it: here a certain one.
    probabilities = [0.2, 0.2, 0.0, 0.0, 0.6]
    assert verify([[-1, -1]], probabilities) == [[3]]
    assert verify([[0, -1], [-1], [1, 0]], probabilities) == [[0, 3], [3], [1, 0, 4]]


@needs_the_fix
@pytest.mark.usefixtures("_in_a_worker")
def test_top_k_is_skipped_where_no_request_has_a_draft() -> None:
    # As after every prompt: unpatched, the maximum of an empty tensor crashes the engine.
    sampling = SimpleNamespace(
        all_greedy=False, temperature=torch.ones(2), top_k=torch.tensor([3, 5]), top_p=None
    )
    counts = torch.zeros(2, dtype=torch.int32)
    constrained = rejection_sampler.apply_sampling_constraints(torch.zeros(0, 8), counts, sampling)
    assert constrained.shape == (0, 8)
