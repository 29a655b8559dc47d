"""Hit rate against the number of branches, for several ways to choose the forks.

Recorded greedy answers of the target are verified again, round by round: the draft's own
continuation is verified against the answer, and the forks decide whether the next look-up hits. A
hit finds K tokens, a miss none. There is no clock and no engine, so the same answers give the same
figures to the last digit.

``--answers`` takes a file, gzipped or not, of lines ``{"p": [prompt ids], "a": [answer ids]}``;
``--topics`` keeps those whose prompt mentions one of some words, plural or not.

    python benchmarks/forks.py --answers FILE [--topics WORD,WORD] [--draft FOLDER] [--figure FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_ssd.cli.models import demo_models
from vllm_ssd.core.arrays import Float32Array, Int32Array, Int64Array
from vllm_ssd.core.forks import Forks, apportion, choose_forks, fork_caps, geometric_fan_out
from vllm_ssd.core.outcomes import OutcomeModel
from vllm_ssd.draft_vocab import FILE as VOCAB_FILE

BRANCHES = (2, 4, 8, 16, 24)
SHOWN = (4, 8, 16, 24)
CHOICES = 33
LONGEST = 512


class Draft(NamedTuple):
    """The draft's continuations after each beginning of one answer: L positions."""

    answer: Int32Array
    """``[L]``, the target's tokens."""
    choices: Int32Array
    """``[L, K + 1, C]``: after i tokens of the answer and k of the draft's own, best first."""
    stated: Float32Array
    """``[L, K + 1, C]``, the draft's probabilities of these."""


# ---- how forks are chosen: chances of all outcomes and caps for each k

Knows = Callable[[Float32Array], Float32Array]
"""The part of the draft's probabilities ``[..., C]`` that an outcome model sees."""

HALVES = 0.5 ** np.arange(1.0, CHOICES)


def everything(stated: Float32Array) -> Float32Array:
    """All of it."""
    return stated


def first_choice(stated: Float32Array) -> Float32Array:
    """The first choice's probability; the others share what is left, half of it for each next."""
    others = (1.0 - stated[..., :1]) * (HALVES / HALVES.sum())
    return np.concatenate([stated[..., :1], others.astype(np.float32)], axis=-1)


def nothing(stated: Float32Array) -> Float32Array:
    """The same for all positions."""
    return first_choice(np.full_like(stated, 0.7))


class Learned:
    """Likeliest outcomes first, as learned from the verifications before.

    Args:
        knows: what the model sees.
        fan_out: the most guesses after each k, ``[K + 1]``; None for no such cap.
    """

    def __init__(self, knows: Knows, fan_out: tuple[int, ...] | None = None) -> None:
        self._knows, self._fan_out = knows, fan_out
        self._model = OutcomeModel(CHOICES)

    def forks(self, verified: Int64Array, stated: Float32Array, branches: int) -> Forks:
        """The outcomes that get a fork, for B answers.

        Args:
            verified: ``[B]``, n of each.
            stated: ``[B, K + 1, C]``, the draft's probabilities.
            branches: of each, the trunk being one.
        """
        chances = self._model.chances(verified, verified + 1, self._knows(stated))
        caps = None if self._fan_out is None else fork_caps(self._fan_out, verified)
        return choose_forks(chances, np.full(len(verified), branches - 1), caps=caps)

    def learn(self, stated: Float32Array, came: Int64Array) -> None:
        """Take in which choice came at positions that were verified, ``[m, C]`` and ``[m]``."""
        self._model.observe(self._knows(stated), came)


class Fixed:
    """A number of guesses after each k, best choices first: the paper's way.

    Args:
        weights: ``[K + 1]``, in proportion to which the branches are split over k.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = weights

    def forks(self, verified: Int64Array, stated: Float32Array, branches: int) -> Forks:
        """As :meth:`Learned.forks`."""
        caps = fork_caps(apportion(self._weights, branches), verified)
        # All that the caps allow; which of them is likelier makes no difference.
        chances = np.ones(stated.shape)
        chances[np.arange(stated.shape[1]) > verified[:, None]] = 0.0
        return choose_forks(chances, np.full(len(verified), branches - 1), caps=caps)

    def learn(self, stated: Float32Array, came: Int64Array) -> None:
        """Nothing is learned."""


def policies(k: int) -> dict[str, Callable[[], Learned | Fixed]]:
    """All ways to choose, by name; made anew for each number of branches."""
    geometric = geometric_fan_out(k, 1000, 0.7, 1.0)
    three = (3,) * (k + 1)
    return {
        "uniform": lambda: Fixed((1.0,) * (k + 1)),
        "geometric": lambda: Fixed(geometric),
        "learned, none": lambda: Learned(nothing),
        "learned, first choice": lambda: Learned(first_choice),
        "first choice, at most 3 a k": lambda: Learned(first_choice, three),
        "learned, all": lambda: Learned(everything),
        "all, at most 3 a k": lambda: Learned(everything, three),
    }


# ---- verifying again


def hit_rate(drafts: list[Draft], policy: Learned | Fixed, branches: int) -> tuple[float, float]:
    """Share of the look-ups that hit, and tokens of a verification.

    All answers are verified side by side, a round of each after the other's.
    """
    depth = drafts[0].choices.shape[1] - 1
    at = np.zeros(len(drafts), np.int64)
    verified = np.zeros(len(drafts), np.int64)
    look_ups = hits = verifications = tokens = 0
    live = np.arange(len(drafts))
    while len(live):
        stated = np.stack([drafts[i].stated[at[i]] for i in live])
        forks = policy.forks(verified[live], stated, branches)
        guessed = set(map(tuple, np.stack(forks[:3], axis=1).tolist()))
        seen: list[Float32Array] = []
        came: list[int] = []
        for row, i in enumerate(live.tolist()):
            answer, choices, _ = drafts[i]
            n, left = int(verified[i]), answer[at[i] :]
            right = choices[at[i], :n, 0][: len(left) - 1] == left[: min(n, len(left) - 1)]
            accepted = int(np.argmin(np.append(right, False)))
            found = np.flatnonzero(choices[at[i], accepted] == left[accepted])
            choice = int(found[0]) if found.size else -1
            hit = (row, accepted, choice) in guessed or (accepted == n and choice == 0)
            seen.append(stated[row, : accepted + 1])
            came += [0] * accepted + [choice]
            at[i] += accepted + 1
            verified[i] = depth if hit else 0
            verifications += 1
            tokens += accepted + 1
            if at[i] < len(answer):  # nothing is looked up after the end
                look_ups += 1
                hits += hit
        policy.learn(np.concatenate(seen), np.array(came))
        live = np.array([i for i in live.tolist() if at[i] < len(drafts[i].answer)], np.int64)
    return hits / look_ups, tokens / verifications


# ---- the draft's continuations


def draft_answers(folder: Path, texts: list[tuple[list[int], list[int]]], k: int) -> list[Draft]:
    """Let the draft go on from every position of every answer, K tokens each.

    One forward reads a text; each of the K that follow decodes one token for all positions, which
    see the text up to their own and what they have decoded themselves.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    vocab = folder / VOCAB_FILE
    ids = torch.arange(model.config.vocab_size)
    if vocab.is_file():
        ids = torch.from_numpy(np.loadtxt(vocab, dtype=np.int64, comments="#"))
    head = model.lm_head.weight[ids]

    def best(hidden: Any) -> tuple[Any, Any]:
        values, found = torch.topk(hidden @ head.T, CHOICES, dim=-1)
        return ids[found], values.softmax(-1)

    found: list[Draft] = []
    with torch.inference_mode():
        for prompt, answer in track(texts, "drafting"):
            text = torch.tensor([prompt + answer])[:, :LONGEST]
            first, length = len(prompt), text.shape[1]
            count = length - first
            out = model.model(text, use_cache=True)
            tokens, shares = best(out.last_hidden_state[0, first - 1 : length - 1])
            choices, stated = [tokens], [shares]
            own = torch.arange(first, length)  # how much of the text each position sees
            sees = torch.arange(length)[None, :] < own[:, None]
            unseen = torch.finfo(torch.float32).min
            for step in range(k):
                sees = torch.cat([sees, torch.eye(count, dtype=torch.bool)], dim=1)
                out = model.model(
                    choices[-1][None, :, 0],
                    attention_mask=torch.where(sees, 0.0, unseen)[None, None],
                    position_ids=(own + step)[None],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                tokens, shares = best(out.last_hidden_state[0])
                choices.append(tokens)
                stated.append(shares)
            found.append(
                Draft(
                    text[0, first:].numpy().astype(np.int32),
                    torch.stack(choices, 1).numpy().astype(np.int32),
                    torch.stack(stated, 1).numpy(),
                )
            )
    return found


def read(answers: Path, topics: str, tokenizer: str) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and answers, those that mention a topic."""
    from transformers import AutoTokenizer

    wanted = re.compile(rf"\b({topics.replace(',', '|')})s?\b", re.IGNORECASE)
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    opened: Any = gzip.open if answers.suffix == ".gz" else open
    with opened(answers, "rt") as lines:
        for line in lines:
            text = json.loads(line)
            if not topics or wanted.search(decode(text["p"]).rsplit("user\n", 1)[-1]):
                yield text["p"], text["a"]


def main() -> None:
    """Draft, verify again with every policy and number of branches, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--answers", type=Path, required=True, help="the target's greedy answers")
    parser.add_argument("--topics", default="", help="comma-separated words")
    parser.add_argument("--draft", type=Path, help="default: the demonstration's")
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--figure", type=Path, help="where to draw the curves (.png, .svg)")
    options = parser.parse_args()
    models = demo_models()
    k = options.num_speculative_tokens
    texts = list(read(options.answers, options.topics, str(models.target)))
    drafts = draft_answers(options.draft or models.draft, texts, k)
    curves = {
        name: [hit_rate(drafts, make(), branches) for branches in BRANCHES]
        for name, make in track(policies(k).items(), "verifying")
    }
    title = f"hit rate (tokens a verification), K = {k}, {len(drafts)} answers"
    table = Table(title=title)
    table.add_column("forks")
    for branches in SHOWN:
        table.add_column(f"{branches} branches", justify="right")
    for name, curve in curves.items():
        at = dict(zip(BRANCHES, curve, strict=True))
        table.add_row(name, *(f"{at[b][0]:.4f} ({at[b][1]:.3f})" for b in SHOWN))
    Console().print(table)
    if options.figure:
        draw(curves, k, options.figure)


def draw(curves: dict[str, list[tuple[float, float]]], k: int, file: Path) -> None:
    """The curves as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, curve in curves.items():
        axes.plot(BRANCHES, [hit for hit, _ in curve], marker="o", markersize=3, label=name)
    axes.set_xlabel("branches per request")
    axes.set_ylabel("hit rate")
    axes.set_title(f"forks: greedy, K = {k}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
