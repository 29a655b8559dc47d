"""Fills proposals up with what followed the same tokens earlier in a request's own text.

The same as :mod:`vllm_ssd.core.ngram` finds, for the whole batch at once: tensor operations whose
shapes depend on the number of requests alone, as in :mod:`.look_up`. vLLM's kernels for its own
n-gram speculator are not used: they search the confirmed text only, not what was found to follow
it, and do not tell how many tokens they found. What is found costs no step anything: the V2 runner
verifies K tokens in any case.
"""

from __future__ import annotations

import torch

from vllm_ssd.core.ngram import LONGEST, SHORTEST
from vllm_ssd.target.ngram import TOTAL, WINDOW
from vllm_ssd.target.v2.look_up import Found

_BEFORE_TEXT, _BEFORE_SUFFIX = -1, -2
"""In place of tokens that lie before the text: equal to none, nor to each other."""


class Ngrams:
    """Finds them.

    Args:
        depth: K.
        vocab_size: the target's; no id from there on is proposed.
        max_length: of a text.
        device: where the texts are.
    """

    def __init__(self, depth: int, vocab_size: int, max_length: int, device: torch.device) -> None:
        self._depth = depth
        self._vocab_size = vocab_size
        self._window = min(WINDOW, max_length)
        self._counting = torch.arange(self._window + depth, device=device)

    def prolong(
        self,
        found: Found,
        texts: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        num_sampled: torch.Tensor,
    ) -> tuple[Found, torch.Tensor]:
        """Replace tokens that only fill up, as far as there are others.

        Args:
            found: what the draft has, after which the text is thought to go on.
            texts: as for the look-up.
            lengths: as there.
            slots: as there.
            num_sampled: as there; 0: nothing is proposed.

        Returns:
            The same with other drafts, and ``[B]`` int32, how many of them are from the text.
        """
        depth = self._depth
        window = max(1, min(self._window, TOTAL // max(1, len(slots))))
        columns, ahead = self._counting[: window + depth], self._counting[:depth]
        drafted = found.drafted[:, None]

        # The last tokens of each text; those found come right behind, and the rest does not count.
        begin = lengths[slots].long()[:, None] - window
        positions = (begin + columns[:window]).clamp(0, texts.shape[1] - 1)
        text = texts[slots[:, None], positions]
        text = text.masked_fill(begin + columns[:window] < 0, _BEFORE_TEXT)
        text = torch.cat([text, found.drafts.to(text.dtype)], dim=1)
        end = window + drafted

        # How many tokens before each place, it included, are the last ones once more.
        longest_suffix = min(LONGEST, len(columns))
        last = end - 1 - columns[:longest_suffix]
        suffix = text.gather(1, last.clamp(min=0))
        suffix = suffix.masked_fill((last < 0) | (suffix == _BEFORE_TEXT), _BEFORE_SUFFIX)
        same = (text == suffix[:, :1]) & (columns < end - 1)
        longest = same.int()
        for i in range(1, longest_suffix):
            same = same[:, 1:] & (text[:, :-i] == suffix[:, i : i + 1])
            longest[:, i:] += same

        # The first of the places where these are most.
        most, place = (longest * len(columns) + (len(columns) - 1 - columns)).max(dim=1)
        begins = place[:, None] + 1 - drafted  # where the first token to fill up with would be
        known = (num_sampled > 0) & (found.ended == 0) & (most >= SHORTEST * len(columns))
        left = (end - begins).clamp(max=depth) - drafted
        matched = left[:, 0].clamp(min=0) * known
        tokens = text.gather(1, (begins + ahead).clamp(0, len(columns) - 1))
        is_matched = (ahead >= drafted) & (ahead < drafted + matched[:, None])
        drafts = torch.where(is_matched, tokens, found.drafts).clamp(0, self._vocab_size - 1)
        return found._replace(drafts=drafts), matched.int()
