"""The best tokens of many logits."""

from __future__ import annotations

import torch

_GROUP = 32
_FEW = 32
"""Times C: with no more groups than that, ``torch.topk`` over all logits is the faster way."""


def best_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits and their tokens, as ``torch.topk`` finds them.

    The C best of a row lie in the C groups of the row with the largest maxima, so only these are
    searched: less work where there are many groups. The tokens of a group are as far apart as there
    are groups, so that the maxima of many groups are found by one vector operation. Among equal
    logits another may be chosen.

    Args:
        logits: ``[n, V]``.
        count: C, at most V.

    Returns:
        Logits and tokens (int64), ``[n, C]`` both, best first.
    """
    rows, vocabulary = logits.shape
    groups = vocabulary // _GROUP
    if groups <= _FEW * count:
        values, tokens = logits.topk(count, dim=-1)
        return values, tokens
    whole = groups * _GROUP
    maxima = logits[:, :whole].unflatten(1, (_GROUP, groups)).amax(dim=1)
    likely = maxima.topk(count, dim=-1, sorted=False).indices
    in_group = torch.arange(0, whole, groups, device=logits.device)
    in_likely = (likely[..., None] + in_group).view(rows, -1)
    rest = torch.arange(whole, vocabulary, device=logits.device)
    among = torch.cat((in_likely, rest.expand(rows, -1)), dim=1)
    values, at = logits.gather(1, among).topk(count, dim=-1)
    return values, among.gather(1, at)
