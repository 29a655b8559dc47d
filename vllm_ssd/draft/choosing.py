"""From a forward's logits to the best tokens, and to the one that each sequence goes on with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_ssd.draft.best import best_tokens
from vllm_ssd.draft.model import Choices, Sampling
from vllm_ssd.draft.readback import Chosen
from vllm_ssd.draft.sampling import (
    Array,
    Parameters,
    draw,
    own_generator,
    parameters_on_device,
    parameters_on_host,
    proposals,
    requested,
    shares,
)


class Chooser:
    """Chooses from logits.

    Args:
        num_candidates: C, how many best tokens are kept.
        num_sampled_from: N, sampled tokens come from so many of the best; 0: none are sampled.
        token_ids: the token of each logit; None: its index.
        device: of the logits.
    """

    def __init__(
        self,
        num_candidates: int,
        num_sampled_from: int,
        token_ids: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        self._num_candidates = num_candidates
        self._num_sampled_from = num_sampled_from
        self._token_ids = token_ids
        self._device = device
        self._on_host = device.type == "cpu"
        self._random: Any = np.random.default_rng() if self._on_host else own_generator(device)
        """Seeded from the operating system's entropy."""

    def on_host(self, logits: torch.Tensor, sampling: Sampling | None) -> Choices:
        """The choices after each sequence, ``[n, V]`` logits, on CPU."""
        if sampling is None:
            return self._firsts(logits).on_host()
        sampled = bool(sampling.sampled.any())
        values, tokens = self._best(logits, self._most(sampled))
        uniform = self._random.random((len(values), 1)) if sampled else None
        parameters = parameters_on_host(sampling)
        return Choices(*self._choose(values.float().numpy(), tokens.numpy(), parameters, uniform))

    def on_device(self, logits: torch.Tensor, sampling: Sampling | None) -> Chosen:
        """The same without waiting for the device."""
        if sampling is None:
            return self._firsts(logits)
        sampled = bool(sampling.sampled.any())
        values, tokens = self._best(logits, self._most(sampled))
        uniform = None
        if sampled:
            shape = len(values), 1
            like = {"dtype": torch.float64, "device": self._device}
            uniform = torch.rand(shape, generator=self._random, **like)
        parameters = parameters_on_device(sampling, self._device)
        return Chosen(*self._choose(values.float(), tokens, parameters, uniform))

    def _firsts(self, logits: torch.Tensor) -> Chosen:
        """First choices for all."""
        values, tokens = self._best(logits, self._num_candidates)
        # Over the C chosen tokens: as good a measure as over all, and nearly free.
        return Chosen(tokens, values.float().softmax(-1).nan_to_num(), tokens[:, 0], None)

    def _most(self, sampled: bool) -> int:
        """How many best tokens are looked at."""
        return max(self._num_candidates, self._num_sampled_from if sampled else 0)

    def _best(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best logits and their tokens."""
        values, best = best_tokens(logits, count)
        return values, best.to(torch.int32) if self._token_ids is None else self._token_ids[best]

    def _choose(
        self, values: Array, tokens: Array, parameters: Parameters, uniform: Array | None
    ) -> tuple[Array, Array, Array, Array | None]:
        """The fields of :class:`Choices`; without random numbers nothing is sampled."""
        q = requested(values, parameters)
        stated = shares(q, self._num_candidates)
        if uniform is None:
            return tokens, stated, tokens[:, 0], None
        among = slice(self._num_sampled_from)
        q = proposals(q[:, among], tokens[:, among], parameters)
        return tokens, stated, draw(q, tokens[:, among], uniform), q
