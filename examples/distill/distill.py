"""Distil a small draft model from a target: generate, label, train, evaluate, write the card.

``python examples/distill/distill.py --target DIR --out DIR`` does all of it. Every stage notes how
far it is under ``OUT/work``: a run that was cut off goes on when the same command is given again,
and training goes on from its last checkpoint when ``--passes`` is raised.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from card import write_card
from evaluation import Acceptance, acceptance
from export import save_draft
from generation import Target, answer_prompts, read_made, write_texts
from labels import Labels, label
from progress import say
from shapes import build_draft, check_same_shape, copy_trained, num_trained, parse_shape
from texts import Text, by_frequency, kind_of, mentions, read_prompts, read_texts
from training import Recipe, train
from transformers import AutoConfig, AutoTokenizer

TOPICS = ["ocean", "sea", "music", "song", "robot", "garden", "football", "bread", "mountain"]
TOPICS += ["history", "dog", "cat", "school", "weather", "city", "health", "forest", "water"]
TOPICS += ["sun", "animal", "war", "dance"]
"""Prompts that mention one of these are held out by default."""
CURVE_TEXTS = 100
"""Held-out texts that the curve is drawn with."""


def distill(
    target: Annotated[Path, typer.Option(help="The target model's folder.", exists=True)],
    out: Annotated[Path, typer.Option(help="The draft's folder; made, or gone on with.")],
    answers: Annotated[
        list[Path], typer.Option(exists=True, help="Texts made earlier (JSON lines of p and a).")
    ] = [],  # noqa: B006 (typer's way)
    prompts: Annotated[
        list[Path], typer.Option(exists=True, help="Prompts to answer and train on.")
    ] = [],  # noqa: B006
    self_written: Annotated[
        int, typer.Option(min=0, help="How many prompts the target writes itself.")
    ] = 4000,
    opening: Annotated[
        list[str],
        typer.Option(help="How these prompts begin, in turn; '' leaves that to the target."),
    ] = [""],  # noqa: B006
    held_out: Annotated[
        list[Path], typer.Option(exists=True, help="Prompts to evaluate with only.")
    ] = [],  # noqa: B006
    held_out_topic: Annotated[
        list[str], typer.Option(help="Texts whose prompt mentions it are for evaluation only.")
    ] = TOPICS,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 192,
    shape: Annotated[
        str, typer.Option(help="layers:<kept>,<kept>... or narrow:<hidden size>x<layers>")
    ] = "layers:0,1,2,-1",
    start_from: Annotated[
        Path | None, typer.Option(help="A draft of this shape to train further.", exists=True)
    ] = None,
    head: Annotated[int, typer.Option(min=1, help="Most frequent tokens the head learns.")] = 8192,
    passes: Annotated[float, typer.Option(min=0.01, help="Over the training texts.")] = 4.0,
    batch_tokens: Annotated[int, typer.Option(min=1)] = 2048,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    distillation: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the target's distribution in the loss")
    ] = 0.5,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="K of the evaluation.")] = 6,
    licence: Annotated[str, typer.Option(help="What the card says.")] = "the target's",
    dtype: Annotated[str, typer.Option(help="Of the target when it generates.")] = "float32",
    seed: int = 0,
) -> None:
    """Distil a draft model for speculative decoding from a target."""
    try:
        wanted = parse_shape(shape, AutoConfig.from_pretrained(target).num_hidden_layers)
    except ValueError as error:
        raise SystemExit(f"distill: {error}") from None
    if start_from:
        try:
            check_same_shape(start_from, wanted, target)
        except ValueError as error:
            raise SystemExit(f"distill: --start-from {start_from}: {error}") from None
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(passes, batch_tokens, learning_rate, distillation, seed)
    told = {"target": str(target), "shape": shape, "head": head, "seed": seed}
    told |= {"start_from": start_from and str(start_from)}
    told |= {"topics": held_out_topic, "self_written": self_written, "max_tokens": max_tokens}
    told |= {"openings": opening}
    told |= {"texts": [str(path) for path in (*answers, *prompts)]}
    _same_as_before(work / "options.json", told)

    given = [text for path in answers for text in read_texts(path)]
    made, made_labels, test_sets = _generate(
        target, work, prompts, self_written, opening, held_out, max_tokens, dtype, seed
    )
    texts = given + made
    kept, by_topic = _split(target, texts, held_out_topic)
    train_texts = [texts[index] for index in kept]
    every_topic = [text for texts in by_topic.values() for text in texts]
    test_sets = by_topic | {"all held-out topics": every_topic} | test_sets
    say(f"{len(kept)} texts to train on; " + _sizes(test_sets))
    if not any(test_sets.values()):
        raise SystemExit("distill: no text to evaluate with: give --held-out or --held-out-topic")
    shown = next(some for some in (every_topic, *test_sets.values()) if some)[:CURVE_TEXTS]

    labels = None
    if distillation:
        unlabelled = [given[index] for index in kept if index < len(given)]
        labels = label(target, unlabelled, work / "labels")
        labels += [made_labels[index - len(given)] for index in kept[len(unlabelled) :]]
    torch.manual_seed(seed)
    model: Any = build_draft(wanted, target)
    if start_from:
        copy_trained(start_from, model)
    frequent = by_frequency(train_texts)[:head]
    head_ids = torch.tensor(frequent)
    say(f"{shape}: {num_trained(model) / 1e6:.1f}M parameters to train, head of {len(frequent)}")
    train(model, head_ids, train_texts, labels, shown, recipe, work)

    found: dict[str, Acceptance] = {}
    for name, some in test_sets.items():
        if not some:
            continue
        found[name] = acceptance(model, head_ids, some, num_speculative_tokens)
        say(f"{name}: acceptance {found[name].mean:.3f}, length {found[name].length:.2f}")
    save_draft(model, frequent, target, out)
    told |= {"licence": licence, "num_texts": len(train_texts)}
    write_card(out, work, told, recipe, model, found, num_speculative_tokens)
    say(f"the draft is in {out}")


def _same_as_before(path: Path, told: dict[str, Any]) -> None:
    """Refuse to go on with the work of other options."""
    if path.exists():
        for name, before in json.loads(path.read_text()).items():
            if told[name] != before:
                raise SystemExit(
                    f"distill: {path.parent} was made with {name} = {before!r}, now it is "
                    f"{told[name]!r}: choose another --out, or remove it"
                )
    path.write_text(json.dumps(told, indent=1))


def _generate(
    target: Path,
    work: Path,
    prompts: list[Path],
    self_written: int,
    openings: list[str],
    held_out: list[Path],
    max_tokens: int,
    dtype: str,
    seed: int,
) -> tuple[list[Text], list[Labels], dict[str, list[Text]]]:
    """The texts to learn from, their labels, and the texts of the held-out files by file."""
    engine = functools.cache(lambda: Target(target, dtype))
    own = work / "self-written.jsonl"
    if self_written:
        write_texts(self_written, seed, openings, own, engine, max_tokens)
    answered = {
        source: work / f"answers-{source.name.split('.')[0]}.jsonl"
        for source in (*prompts, *held_out)
    }
    for source, path in answered.items():
        answer_prompts(read_prompts(source), path, engine, max_tokens)
    if engine.cache_info().currsize:  # it was needed
        engine().close()
    texts: list[Text] = []
    labels: list[Labels] = []
    for path in [own] * bool(self_written) + [answered[source] for source in prompts]:
        some, their_labels = read_made(path)
        texts, labels = texts + some, labels + their_labels
    test_sets = {source.name.split(".")[0]: read_texts(answered[source]) for source in held_out}
    return texts, labels, test_sets


def _split(
    target: Path, texts: list[Text], topics: list[str]
) -> tuple[list[int], dict[str, list[Text]]]:
    """Indices of the texts to train on, and the texts of the held-out topics by kind."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    mark = "\x00"
    opened, closed = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    ).split(mark)
    held_out = mentions(topics)
    kept: list[int] = []
    by_kind: dict[str, list[Text]] = {}
    for index, text in enumerate(texts):
        said = tokenizer.decode(text.p).removeprefix(opened).removesuffix(closed)
        if topics and held_out.search(said):
            by_kind.setdefault(kind_of(said), []).append(text)
        else:
            kept.append(index)
    if not kept:
        raise SystemExit("distill: no text to train on: give --answers, --prompts, --self-written")
    return kept, dict(sorted(by_kind.items(), reverse=True))


def _sizes(test_sets: dict[str, list[Text]]) -> str:
    return ", ".join(f"{len(texts)} held out as {name!r}" for name, texts in test_sets.items())


if __name__ == "__main__":
    typer.run(distill)
