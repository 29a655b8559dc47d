"""The texts for training and evaluation: reading, generating, holding out."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from generation import Target, answer_prompts, has_labels, read_made, write_texts
from labels import Labels, label
from texts import KINDS, Text, kind_of, mentions, read_prompts, read_texts
from transformers import AutoTokenizer

CURVE_TEXTS = 100
ALL_TOPICS = "all held-out topics"
OWN = "self-written"
OPTIONS = "options.json"
"""The file of the tool's options, in the folder of its work."""


@dataclass(frozen=True)
class Sources:
    """Where the texts come from; files by their names up to the first dot."""

    answers: list[Text]
    """Made elsewhere, without labels."""
    labelled: list[tuple[list[Text], list[Labels]]]
    """Made earlier, with their labels beside them."""
    prompts: dict[str, list[str]]
    """To be answered and learned from."""
    held_out: dict[str, list[str]]
    """To be answered for the evaluation only."""
    self_written: int
    openings: list[str]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Texts:
    """The texts made from them."""

    given: list[Text]
    made: list[Text]
    made_labels: list[Labels]
    of_files: dict[str, list[Text]]
    """The held-out files' texts."""


@dataclass(frozen=True)
class Split:
    """Texts to train on, and those to evaluate with by what they have in common."""

    given: list[Text]
    made: list[Text]
    made_labels: list[Labels]
    test_sets: dict[str, list[Text]]

    @property
    def shown(self) -> list[Text]:
        """The texts for the curve: some of all held-out topics, or else of the first file."""
        some = self.test_sets.get(ALL_TOPICS) or next(iter(self.test_sets.values()))
        return some[:: -(-len(some) // CURVE_TEXTS)]

    @property
    def train(self) -> list[Text]:
        """All to train on."""
        return self.given + self.made

    def labels(self, target: Path, folder: Path) -> list[Labels]:
        """One for each of them; those that vLLM did not return are computed."""
        return label(target, self.given, folder) + self.made_labels


def read_sources(
    target: Path,
    answers: Sequence[Path],
    prompts: Sequence[Path],
    held_out: Sequence[Path],
    self_written: int,
    openings: list[str],
    max_tokens: int,
    seed: int,
) -> Sources:
    """Read all files, before anything is generated.

    Raises:
        ValueError: one cannot be read, is empty, has the name of another one, or labels of other
            texts or of another target.
    """
    named: dict[str, Path] = {}
    for path in (*prompts, *held_out):
        name = path.name.split(".")[0]
        if name in {OWN, ALL_TOPICS, *KINDS}:
            raise ValueError(f"{path}: the name {name!r} is taken: rename the file")
        if name in named:
            raise ValueError(f"{path} and {named[name]} are both called {name!r}: rename one")
        named[name] = path
    read = {name: read_prompts(path) for name, path in named.items()}
    return Sources(
        answers=[text for path in answers if not has_labels(path) for text in read_texts(path)],
        labelled=[_read_labelled(path, target) for path in answers if has_labels(path)],
        prompts={name: some for name, some in read.items() if named[name] in prompts},
        held_out={name: some for name, some in read.items() if named[name] in held_out},
        self_written=self_written,
        openings=openings,
        max_tokens=max_tokens,
        seed=seed,
    )


def _read_labelled(path: Path, target: Path) -> tuple[list[Text], list[Labels]]:
    """Texts of an earlier run, whose options are in a file beside them."""
    told = path.parent / OPTIONS
    if told.exists():
        theirs = Path(json.loads(told.read_text())["target"])
        if theirs.name != target.name:
            raise ValueError(f"{path}: its labels are of {theirs.name}, not of {target.name}")
    return read_made(path)


def generate(sources: Sources, target: Path, dtype: str, work: Path) -> Texts:
    """Let the target write the texts that are missing in ``work``."""
    engine = functools.cache(lambda: Target(target, dtype))
    made = []
    if sources.self_written:
        made.append(work / f"{OWN}.jsonl")
        write_texts(
            sources.self_written,
            sources.seed,
            sources.openings,
            made[-1],
            engine,
            sources.max_tokens,
        )
    answered = {}
    for name, some in (sources.prompts | sources.held_out).items():
        answered[name] = work / f"answers-{name}.jsonl"
        answer_prompts(some, answered[name], engine, sources.max_tokens)
    if engine.cache_info().currsize:  # it was needed
        engine().close()
    made += [answered[name] for name in sources.prompts]
    both = sources.labelled + [read_made(path) for path in made]
    return Texts(
        given=sources.answers,
        made=[text for texts, _ in both for text in texts],
        made_labels=[labels for _, some in both for labels in some],
        of_files={name: read_texts(answered[name]) for name in sources.held_out},
    )


def hold_out(texts: Texts, target: Path, topics: list[str]) -> Split:
    """Keep texts whose prompt mentions a topic for the evaluation, by kind.

    Raises:
        ValueError: nothing is left to train on, or to evaluate with.
    """
    tokenizer = AutoTokenizer.from_pretrained(target)
    mark = "\x00"
    opened, closed = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    ).split(mark)
    found = mentions(topics).search if topics else lambda said: None
    held: dict[str, list[Text]] = {}

    def is_kept(text: Text) -> bool:
        said = tokenizer.decode(text.p).removeprefix(opened).removesuffix(closed)
        if not found(said):
            return True
        held.setdefault(kind_of(said), []).append(text)
        return False

    given = [text for text in texts.given if is_kept(text)]
    kept = [is_kept(text) for text in texts.made]
    made = [text for text, keep in zip(texts.made, kept, strict=True) if keep]
    labels = [some for some, keep in zip(texts.made_labels, kept, strict=True) if keep]
    by_kind = {kind: held[kind] for kind in KINDS if kind in held}
    all_held = {ALL_TOPICS: [text for some in by_kind.values() for text in some]} if held else {}
    test_sets = by_kind | all_held | {name: some for name, some in texts.of_files.items() if some}
    if not given and not made:
        raise ValueError(
            "no text to train on: give --answers, --prompts or --self-written, or hold out less"
        )
    if not test_sets:
        raise ValueError("no text to evaluate with: give --held-out or --held-out-topic")
    return Split(given, made, labels, test_sets)
