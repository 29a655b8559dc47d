"""Training and test texts: a prompt and the target's greedy answer, as token ids, one a line."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np


class Text(msgspec.Struct, frozen=True):
    """A prompt with its chat template around it, and the target's greedy answer to it."""

    p: list[int]
    a: list[int]


class _Prompt(msgspec.Struct):
    prompt: str = ""
    turns: list[str] = []  # msgspec copies it


def read_texts(path: Path) -> list[Text]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        ValueError: a line is not a text; names the file and the line.
    """
    texts = []
    for number, line in enumerate(_lines(path), 1):
        try:
            text = msgspec.json.decode(line, type=Text)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if text.p and text.a:
            texts.append(text)
    return texts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a line each, or JSON lines with ``prompt`` or (the first of) ``turns``.

    Raises:
        ValueError: no prompt at all, or a line of JSON without one; names the file and the line.
    """
    prompts = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if ".jsonl" in path.name:
            try:
                record = msgspec.json.decode(line, type=_Prompt)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            prompt = record.prompt or next(iter(record.turns), "")
            if not prompt:
                raise ValueError(f"{path}, line {number}: neither 'prompt' nor 'turns' in it")
        else:
            prompt = line.decode().strip()
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: there is no prompt in it")
    return prompts


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


KINDS = ("stories", "others", "explanations")
STORIES = re.compile(r"\b(story|stories|tale|narrative|fable)\b", re.IGNORECASE)
EXPLANATIONS = re.compile(
    r"^(explain|what|how|why|describe|tell me (about|how|why)|can you explain|define)\b",
    re.IGNORECASE,
)


def kind_of(prompt: str) -> str:
    """``stories``, ``explanations`` or ``others``, by the words of a user's message."""
    if STORIES.search(prompt):
        return "stories"
    return "explanations" if EXPLANATIONS.search(prompt) else "others"


def mentions(topics: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some words, plural or not."""
    return re.compile(rf"\b({'|'.join(map(re.escape, topics))})s?\b", re.IGNORECASE)


def by_frequency(texts: Iterable[Text]) -> list[int]:
    """Token ids that occur in answers, most frequent first (ties: lower id first)."""
    counts = np.bincount(np.concatenate([np.asarray(text.a, np.int64) for text in texts]))
    order = np.lexsort((np.arange(len(counts)), -counts))
    return [int(token) for token in order[: int((counts > 0).sum())]]


def batches(lengths: np.ndarray, most_tokens: int, seed: int) -> list[np.ndarray]:
    """Indices of texts in batches of similar length, each padded to at most ``most_tokens``.

    The texts are shuffled first, so that another seed makes other batches.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order] // 16, kind="stable")]
    groups: list[np.ndarray] = []
    start = 0
    for end in range(1, len(order) + 1):
        longest = int(lengths[order[start : end + 1]].max())
        if end == len(order) or longest * (end + 1 - start) > most_tokens:
            groups.append(order[start:end])
            start = end
    generator.shuffle(groups)
    return groups
