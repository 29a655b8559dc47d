"""The exact distribution of sampled tokens, by enumeration, and the test of samples against it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_LEFT_OUT = 1e-3
"""Probability of the prefixes that are not followed: ten of ten thousand samples, spread over all
tokens, which changes the statistic less than chance does."""


class ExactSampler:
    """Probabilities of the first tokens that a model writes after a prompt.

    Args:
        model: folder of the model.
        prompt: token ids.
        temperature: as vLLM's.
        top_p: as vLLM's: the smallest set of tokens with at least this probability.
    """

    def __init__(
        self, model: Path, prompt: Sequence[int], temperature: float, top_p: float = 1.0
    ) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        self._temperature = temperature
        self._top_p = top_p
        with torch.inference_mode():
            # All but its last token, with which every text below begins, is computed only once.
            self._last = prompt[-1]
            self._before = self._model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values

    @torch.inference_mode()
    def marginals(self, positions: int) -> list[torch.Tensor]:
        """The distribution of each of the first tokens, ``[vocabulary]`` each, by enumeration."""
        marginals = []
        prefixes, weights = torch.tensor([[self._last]]), torch.ones(1)
        for position in range(positions):
            marginal = torch.zeros(0)
            joints = []
            for part, weight in zip(prefixes.split(512), weights.split(512), strict=True):
                joint = weight[:, None] * self._following(part)
                marginal = joint.sum(0) + (marginal if len(marginal) else 0.0)
                if position + 1 < positions:
                    joints.append(joint)
            marginals.append(marginal)
            if joints:
                prefixes, weights = _likeliest(prefixes, torch.cat(joints))
        return marginals

    def _following(self, texts: torch.Tensor) -> torch.Tensor:
        """``[texts, vocabulary]``, as vLLM would sample from it."""
        before = copy.deepcopy(self._before)
        before.batch_repeat_interleave(len(texts))
        output = self._model(texts, past_key_values=before, logits_to_keep=1)
        logits = output.logits[:, -1] / self._temperature
        ascending, order = logits.softmax(-1).sort(dim=-1)
        out = ascending.cumsum(-1) <= 1.0 - self._top_p
        out[:, -1] = False
        return logits.masked_fill(out.scatter(1, order, out), -math.inf).softmax(-1)


def _likeliest(prefixes: torch.Tensor, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefixes one token longer that matter, and the probability of each."""
    order = joint.flatten().argsort(descending=True)
    mass = joint.flatten()[order].cumsum(0)
    order = order[: int((mass < mass[-1] - _LEFT_OUT).sum()) + 1]
    rows, tokens = order // joint.shape[1], order % joint.shape[1]
    return torch.cat([prefixes[rows], tokens[:, None]], dim=1), joint.flatten()[order]


def deviation(tokens: Sequence[int], probabilities: torch.Tensor) -> float:
    """How far samples are from a distribution, in standard deviations of the chi-square statistic.

    Wilson and Hilferty's cube root makes the statistic nearly normal.
    """
    statistic, freedom = _chi_square(tokens, probabilities)
    spread = 2.0 / (9.0 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1.0 - spread)) / spread**0.5)


def p_value(tokens: Sequence[int], probabilities: torch.Tensor) -> float:
    """How often samples of a distribution are as far from it as these, by the chi-square test."""
    statistic, freedom = _chi_square(tokens, probabilities)
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half))


def _chi_square(tokens: Sequence[int], probabilities: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom.

    Tokens expected fewer than eight times are counted together. One that cannot be, and is there
    all the same, makes the statistic infinite.
    """
    counts, total = Counter(tokens), len(tokens)
    impossible = sum(counts[token] for token in counts if probabilities[token] <= 0.0)
    observed: list[float] = []
    expected: list[float] = []
    seen = wanted = 0.0
    for token in probabilities.argsort(descending=True).tolist():
        seen += counts[token]
        wanted += float(probabilities[token]) * total
        if wanted >= 8.0:
            observed.append(seen)
            expected.append(wanted)
            seen = wanted = 0.0
    observed[-1] += seen
    expected[-1] += wanted
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return math.inf if impossible else statistic, max(1, len(observed) - 1)
