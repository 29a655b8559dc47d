"""The best tokens of many logits."""

from __future__ import annotations

import torch

_CHUNK = 128
_FEW = 8
"""Times C: with no more chunks than that, ``torch.topk`` over all logits is the faster way."""


def best_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits and their tokens, as ``torch.topk`` finds them.

    The C best of a row lie in the C chunks of the row with the largest maxima, so only these are
    searched: less work where there are many chunks. Among equal logits another may be chosen.

    Args:
        logits: ``[n, V]``.
        count: C, at most V.

    Returns:
        Logits and tokens (int64), ``[n, C]`` both, best first.
    """
    rows, vocabulary = logits.shape
    chunks = vocabulary // _CHUNK
    if chunks <= _FEW * count:
        values, tokens = logits.topk(count, dim=-1)
        return values, tokens
    whole = chunks * _CHUNK
    maxima = logits[:, :whole].unflatten(1, (chunks, _CHUNK)).amax(dim=-1)
    likely = maxima.topk(count, dim=-1, sorted=False).indices
    in_chunk = torch.arange(_CHUNK, device=logits.device)
    in_likely = (likely[..., None] * _CHUNK + in_chunk).view(rows, -1)
    rest = torch.arange(whole, vocabulary, device=logits.device)
    among = torch.cat((in_likely, rest.expand(rows, -1)), dim=1)
    values, at = logits.gather(1, among).topk(count, dim=-1)
    return values, among.gather(1, at)
