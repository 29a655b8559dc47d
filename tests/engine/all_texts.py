"""The exact distribution of what a model of few tokens writes: all texts are enumerated."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.engine.exact_distribution import p_value

if TYPE_CHECKING:
    from vllm import SamplingParams

Allowed = Callable[[torch.Tensor], torch.Tensor]
"""From texts, ``[n, length]``, to the tokens that may follow each, ``[n, vocabulary]`` bool."""


class AllTexts:
    """All texts of a few tokens that a model can write after a prompt.

    Args:
        model: folder of the model.
        prompt: token ids.
        length: tokens of each text.
    """

    def __init__(self, model: Path, prompt: Sequence[int], length: int) -> None:
        from transformers import AutoModelForCausalLM

        self.prompt, self.length = prompt, length
        computed: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        self.vocabulary: int = computed.config.vocab_size
        self._texts = [
            torch.tensor(
                list(itertools.product(range(self.vocabulary), repeat=n)), dtype=torch.long
            )
            for n in range(length)
        ]
        self._logits = []
        *first, last = prompt
        with torch.inference_mode():
            before = computed(torch.tensor([first]), use_cache=True).past_key_values
            for texts in self._texts:
                parts = []
                for part in texts.split(1024):
                    known = copy.deepcopy(before)
                    known.batch_repeat_interleave(len(part))
                    rest = torch.cat([torch.full((len(part), 1), last), part], 1)
                    output = computed(rest, past_key_values=known, logits_to_keep=1)
                    parts.append(output.logits[:, -1])
                self._logits.append(torch.cat(parts))

    def following(
        self, after: int, params: SamplingParams, allowed: Allowed | None = None
    ) -> torch.Tensor:
        """What follows each text of ``after`` tokens, ``[texts, vocabulary]``, as vLLM samples.

        Args:
            after: tokens of the texts.
            params: vLLM's.
            allowed: a grammar.
        """
        texts, logits = self._texts[after], self._logits[after].clone()
        if allowed is not None:
            logits.masked_fill_(~allowed(texts), -math.inf)
        for words in params._bad_words_token_ids or []:
            *before, last = words
            said = torch.tensor([*self.prompt, *before])[-len(before) :] if before else None
            hit = torch.full((len(texts),), not before)
            if before and after >= len(before):
                hit = (texts[:, after - len(before) :] == said).all(1)
            logits[hit, last] = -math.inf
        if after < params.min_tokens:
            logits[:, list(params.all_stop_token_ids)] = -math.inf
        logits = self._penalised(texts, logits, params) / params.temperature
        if 0 < params.top_k < self.vocabulary:
            smallest = logits.topk(params.top_k).values[:, -1:]
            logits.masked_fill_(logits < smallest, -math.inf)
        ascending, order = logits.softmax(-1).sort(dim=-1)
        out = ascending.cumsum(-1) <= 1.0 - params.top_p
        out[:, -1] = False
        return logits.masked_fill(out.scatter(1, order, out), -math.inf).softmax(-1)

    def _penalised(
        self, texts: torch.Tensor, logits: torch.Tensor, params: SamplingParams
    ) -> torch.Tensor:
        counts = torch.zeros(logits.shape).scatter_add_(
            1, texts, torch.ones(texts.shape, dtype=torch.float32)
        )
        seen = counts > 0
        in_prompt = torch.zeros(self.vocabulary, dtype=torch.bool)
        in_prompt[list(self.prompt)] = True
        factor = params.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(seen | in_prompt, repeated, logits)
        return logits - params.frequency_penalty * counts - params.presence_penalty * seen

    def p_values(
        self,
        found: Sequence[Sequence[int]],
        params: SamplingParams,
        ends: Sequence[int] = (),
        allowed: Allowed | None = None,
    ) -> list[float]:
        """The chi-square tests of texts against the exact distribution.

        Args:
            found: the texts, those that have ended shorter than :attr:`length`.
            params: vLLM's, with which they were sampled.
            ends: tokens that end a text.
            allowed: a grammar.

        Returns:
            For each position the test of its token, and that of it and the token before.
        """
        absent = self.vocabulary
        size = absent + 1
        padded = [[*text, *[absent] * self.length][: self.length] for text in found]
        values = []
        weights, gone = torch.ones(1, dtype=torch.float64), 0.0
        ended_now = torch.zeros(absent, dtype=torch.float64)
        for at in range(self.length):
            # Where a grammar lets nothing follow, no text gets.
            following = self.following(at, params, allowed).nan_to_num()
            joint = weights[:, None] * following.double()
            single = torch.zeros(size, dtype=torch.float64)
            single[:absent], single[absent] = joint.sum(0), gone
            values.append(p_value([text[at] for text in padded], single))
            if at:
                pairs = torch.zeros(size, size, dtype=torch.float64)
                by_last = joint.reshape(-1, absent, absent).sum(0)
                pairs[:absent, :absent] = by_last
                # A text may have ended with its last token or before.
                for end in ends:
                    pairs[end, absent] = ended_now[end]
                pairs[absent, absent] = gone - float(pairs[:absent, absent].sum())
                codes = [text[at - 1] * size + text[at] for text in padded]
                values.append(p_value(codes, pairs.flatten()))
            ended_now = joint.sum(0)
            gone += float(sum(ended_now[end] for end in ends))
            joint[:, list(ends)] = 0.0
            weights = joint.flatten()
        return values
