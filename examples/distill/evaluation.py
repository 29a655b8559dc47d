"""How many of a draft's tokens the target would accept, on answers the draft has not seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from texts import Text, batches
from torch.nn.functional import linear

BATCH_TOKENS = 4096


class Acceptance(NamedTuple):
    """The result on one set of texts."""

    mean: float
    """Share of the answers' tokens that the draft predicts, the text before them being given."""
    length: float
    """Acceptance length at K speculative tokens: 1 + accepted / drafts, greedy."""
    tokens: int
    """Tokens of the answers."""


@torch.inference_mode()
def acceptance(
    model: Any, head_ids: torch.Tensor, texts: list[Text], num_speculative_tokens: int = 6
) -> Acceptance:
    """Greedy acceptance of a draft.

    The target is greedy too, so after accepted tokens the draft proposes what it predicts there
    with the answer given: one forward over each text gives the end of every round.

    Args:
        model: a causal language model.
        head_ids: ``[N]`` int64, the tokens its head is computed for.
        texts: prompts with the target's answers.
        num_speculative_tokens: K.
    """
    right: list[np.ndarray] = []
    lengths = np.array([len(text.p) + len(text.a) for text in texts])
    head = model.lm_head.weight[head_ids]
    for group in batches(lengths, BATCH_TOKENS, seed=0):
        some = [texts[index] for index in group]
        hidden, answers = answer_states(model, some)
        guesses = torch.cat([linear(part, head).argmax(-1) for part in hidden.split(1024)])
        matches = (head_ids[guesses] == answers).numpy()
        right += np.split(matches, np.cumsum([len(text.a) for text in some])[:-1])
    drafts = sum(_rounds(matches, num_speculative_tokens) for matches in right)
    tokens = sum(map(len, right))
    return Acceptance(
        mean=float(np.concatenate(right).mean()), length=tokens / drafts, tokens=tokens
    )


def answer_states(model: Any, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states before each answer's token, ``[T, H]``, and these tokens, ``[T]``."""
    lengths = [len(text.p) + len(text.a) for text in texts]
    tokens = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    before = torch.zeros_like(tokens, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : lengths[row]] = torch.tensor(text.p + text.a)
        before[row, len(text.p) - 1 : lengths[row] - 1] = True
    # Padded at the end: the causal mask keeps it from the tokens that count.
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    return hidden[before], torch.tensor([token for text in texts for token in text.a])


def _rounds(matches: np.ndarray, num_speculative_tokens: int) -> int:
    """Verifications that it takes to produce the text; each adds one token to those accepted."""
    position = rounds = 0
    while position < len(matches):
        accepted = 0
        while (
            accepted < num_speculative_tokens
            and position + accepted < len(matches)
            and matches[position + accepted]
        ):
            accepted += 1
        position += accepted + 1
        rounds += 1
    return rounds
