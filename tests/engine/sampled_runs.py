"""Many short requests on an engine whose draft samples, tested against the exact distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tests.engine.all_texts import Allowed, AllTexts
from tests.engine.harness import Engine, difference
from tests.tiny_models import EOS, TinyModels

PROMPT = [1, 5, 7, 9, 11, 13, 20, 22, 3]
LENGTH = 4
"""So many first tokens are tested."""
TOKENS = 6
"""So many are written: the fourth may be drafted, at the beginning or the end of a proposal."""
REQUESTS = 20_000
LEAST_HITS = 0.3
LEAST_DRAFTED = 0.1
"""Of all look-ups where the target waits: before the first token the draft may not have the text,
and before the last one nothing is drafted."""
LEAST_P = 1e-3
SURELY_WRONG = 1e-9


@contextmanager
def sampling_engine(
    models: TinyModels, draft: str, engine: dict[str, Any] | None = None, **options: Any
) -> Iterator[Engine]:
    """An engine whose draft samples wherever it may."""
    speculation = {
        "method": "ssd",
        "model": str(models.drafts()[draft]),
        "num_speculative_tokens": 3,
        "draft_sampling": "probabilistic",
        "backup": "none",
        "max_wait_ms": 300.0,
        "branches": 8,
        "strict": True,
        **options,
    }
    running = Engine(
        str(models.target),
        speculative_config=speculation,
        disable_log_stats=False,
        **{"max_num_seqs": 96, "max_model_len": 64, **(engine or {})},
    )
    try:
        yield running
    finally:
        running.close()


class Sampled:
    """What an engine wrote.

    Args:
        engine: an engine.
        requests: how many are sampled; beside every ninth of them is a greedy one.
        seed: of the target's random numbers, if it is in this process.
        parameters: vLLM's sampling parameters.
        temperatures: beside those of the texts that are tested, other requests of the same batches
            have these, in turn.
        prompt: what the texts follow.
    """

    def __init__(
        self,
        engine: Engine,
        requests: int = REQUESTS,
        seed: int = 0,
        temperatures: Sequence[float] = (0.0,),
        prompt: Sequence[int] = PROMPT,
        **parameters: Any,
    ) -> None:
        from vllm import SamplingParams

        self.params = SamplingParams(**{"max_tokens": TOKENS, "ignore_eos": True, **parameters})
        self.params.update_from_generation_config({}, EOS)
        self.params.update_from_tokenizer(engine.llm.get_tokenizer())
        others = [
            SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=temperature)
            for temperature in temperatures
        ]
        every = [
            others[i // 10 % len(others)] if others and i % 10 == 9 else self.params
            for i in range(requests * 10 // 9 if others else requests)
        ]
        prompts: Any = [{"prompt_token_ids": list(prompt)}] * len(every)
        torch.manual_seed(seed)
        np.random.seed(seed)  # of the V2 runner
        before = engine.stats()
        outputs = engine.llm.generate(prompts, every, use_tqdm=False)
        self.stats = difference(engine.stats(), before)
        self.texts = [
            tuple(output.outputs[0].token_ids)
            for output, params in zip(outputs, every, strict=True)
            if params is self.params
        ]
        self.greedy = {
            tuple(output.outputs[0].token_ids)
            for output, params in zip(outputs, every, strict=True)
            if params.temperature == 0.0
        }

    @property
    def hit_rate(self) -> float:
        """Of the look-ups that could find something."""
        return self.stats["hits"] / self.stats["look_ups"]

    def assert_sampled(self) -> None:
        """Fail if this run proves nothing: too few hits, or no q' was used."""
        stats = self.stats
        # Tokens that were waited for are no hits.
        drafted = stats["verifications"] / stats["look_ups"]
        assert self.hit_rate > LEAST_HITS or drafted > LEAST_DRAFTED, (self.hit_rate, drafted)
        assert stats["tokens_with_probabilities"] > 0.3 * stats["tokens_drafted"]
        assert stats["batches_too_large"] == stats["errors"] == stats["resyncs"] == 0
        assert len(self.greedy) <= 1


def check(
    engine: Engine,
    exact: AllTexts,
    requests: int = REQUESTS,
    ends: Sequence[int] = (),
    allowed: Allowed | None = None,
    **parameters: Any,
) -> Sampled:
    """Sample texts and test them; once more with other seeds if they fail, as one run in a hundred
    does by chance. A fault fails both."""
    for seed in (1, 2):
        sampled = Sampled(engine, requests, seed, **parameters)
        values = exact.p_values(sampled.texts, sampled.params, ends, allowed)
        if min(values) > LEAST_P:
            return sampled
    raise AssertionError(f"p-values of tokens, and of pairs with the one before: {values}")
