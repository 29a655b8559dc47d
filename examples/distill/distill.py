"""Distil a small draft model from a target: generate, label, train, evaluate, write the card.

``python examples/distill/distill.py --target DIR --out DIR`` does all of it. Every stage notes how
far it is under ``OUT/work``: a run that was cut off goes on when the same command is given again,
and training goes on from its last checkpoint when ``--passes`` is raised.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from card import write_card
from evaluation import Acceptance, acceptance
from export import save_draft
from generation import MAX_ANSWER
from progress import say, track
from quantize import quantize_layers
from shapes import build_draft, check_same_shape, copy_trained, num_trained, parse_shape
from sources import OPTIONS, generate, hold_out, read_sources
from texts import Text, by_frequency
from training import Recipe, train

from vllm_ssd.cli.engine_process import cpu_has_bfloat16

TOPICS = ["ocean", "sea", "music", "song", "robot", "garden", "football", "bread", "mountain"]
TOPICS += ["history", "dog", "cat", "school", "weather", "city", "health", "forest", "water"]
TOPICS += ["sun", "animal", "war", "dance"]
"""Prompts that mention one of these are held out by default."""


def distill(
    target: Annotated[Path, typer.Option(help="The target model's folder.", exists=True)],
    out: Annotated[Path, typer.Option(help="The draft's folder; made, or gone on with.")],
    answers: Annotated[
        list[Path],
        typer.Option(exists=True, help="Texts made earlier: JSON lines of p and a, labels beside."),
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
        list[str],
        typer.Option(help="Texts whose prompt mentions it are for evaluation only; '' for none."),
    ] = TOPICS,
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_ANSWER, help="Of an answer.")] = 192,
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
    quantize: Annotated[
        Literal["none", "int8"],
        typer.Option(help="How the layers are stored and computed; may change for a finished run."),
    ] = "none",
    licence: Annotated[str, typer.Option(help="What the card says.")] = "the target's",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Of generating and of training; auto: bfloat16 if the CPU computes it."),
    ] = "auto",
    seed: int = 0,
) -> None:
    """Distil a draft model for speculative decoding from a target."""
    topics = [topic for topic in held_out_topic if topic]
    work = out / "work"
    if dtype == "auto":
        dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    recipe = Recipe(passes, batch_tokens, learning_rate, distillation, dtype, seed)
    told = {"target": str(target), "shape": shape, "head": head, "seed": seed, "dtype": dtype}
    told |= {"start_from": start_from and str(start_from), "topics": topics}
    told |= {"self_written": self_written, "openings": opening, "max_tokens": max_tokens}
    told |= {"texts": [str(path) for path in (*answers, *prompts)]}
    told |= {"files": {str(path): _digest(path) for path in (*answers, *prompts, *held_out)}}
    try:
        wanted = parse_shape(shape, target)
        if start_from:
            check_same_shape(start_from, wanted, target)
        sources = read_sources(
            target, answers, prompts, held_out, self_written, opening, max_tokens, seed
        )
        _same_as_before(work / OPTIONS, told)
        texts = hold_out(generate(sources, target, dtype, work), target, topics)
    except ValueError as error:
        raise SystemExit(f"distill: {error}") from None
    sizes = [f"{len(some)} held out as {name!r}" for name, some in texts.test_sets.items()]
    say(f"{len(texts.train)} texts to train on; {', '.join(sizes)}")

    labels = texts.labels(target, work / "labels") if distillation else None
    torch.manual_seed(seed)
    model: Any = build_draft(wanted, target)
    if start_from:
        copy_trained(start_from, model)
    frequent = by_frequency(texts.train)[:head]
    head_ids = torch.tensor(frequent)
    say(f"{shape}: {num_trained(model) / 1e6:.1f}M parameters to train, head of {len(frequent)}")
    try:
        train(model, head_ids, texts.train, labels, texts.shown, recipe, work)
    except ValueError as error:
        raise SystemExit(f"distill: {error}") from None

    parameters = num_trained(model)
    found = _evaluate(model, head_ids, texts.test_sets, num_speculative_tokens)
    in_float: dict[str, Acceptance] = {}
    if quantize == "int8":
        try:
            quantize_layers(model)
        except ValueError as error:
            raise SystemExit(f"distill: {error}") from None
        say("and with layers in int8:")
        in_float = found
        found = _evaluate(model, head_ids, texts.test_sets, num_speculative_tokens)
    save_draft(model, frequent, target, out)
    told |= {"licence": licence, "num_texts": len(texts.train)}
    write_card(out, work, told, recipe, parameters, found, in_float, num_speculative_tokens)
    say(f"the draft is in {out}")


def _evaluate(
    model: Any, head_ids: torch.Tensor, test_sets: dict[str, list[Text]], depth: int
) -> dict[str, Acceptance]:
    """Acceptance on each of the test sets, with at most ``depth`` speculative tokens."""
    found: dict[str, Acceptance] = {}
    for name, some in track(list(test_sets.items()), "evaluating"):
        found[name] = acceptance(model, head_ids, some, depth)
        say(f"{name}: acceptance {found[name].mean:.3f}, length {found[name].length:.2f}")
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _same_as_before(path: Path, told: dict[str, Any]) -> None:
    """Refuse to go on with the work of other options.

    Raises:
        ValueError: they differ.
    """
    if path.exists():
        for name, before in json.loads(path.read_text()).items():
            if told[name] != before:
                raise ValueError(
                    f"{path.parent} was made with {name} = {before!r}, now it is {told[name]!r}: "
                    "choose another --out, or remove it"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(told, indent=1))
    scratch.rename(path)


if __name__ == "__main__":
    typer.run(distill)
