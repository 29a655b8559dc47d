"""The model card: what the draft is, what it was made from and how well it predicts the target."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation import Acceptance
from training import Recipe

INT8 = (
    "- **Layers** int8: weights with one scale a row, activations with one a token (W8A8 of",
    "  compressed-tensors); embedding, head and norms bfloat16.",
)


def write_card(
    folder: Path,
    work: Path,
    options: dict[str, Any],
    recipe: Recipe,
    parameters: int,
    found: dict[str, Acceptance],
    in_float: dict[str, Acceptance],
    num_speculative_tokens: int,
) -> None:
    """Write ``README.md`` beside the weights.

    Args:
        folder: the draft's.
        work: where the curve is.
        options: the command's options, and the number of texts.
        recipe: of the training.
        parameters: how many are the draft's own.
        found: acceptance of each test set.
        in_float: the same before the layers were quantised; empty if they are not.
        num_speculative_tokens: K of the acceptance lengths.
    """
    curve = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    last = curve[-1]
    target = Path(options["target"]).name
    sources = [Path(path).name for path in options["texts"]]
    if options["self_written"]:
        sources.append(f"answers to {options['self_written']} prompts of the target's own")
        sources += [f"begun with {words!r}" for words in options["openings"] if words]
    begun = f", from the draft `{Path(start).name}` on" if (start := options["start_from"]) else ""
    lines = [
        f"# A draft for {target}",
        "",
        f"Distilled from {target} with `examples/distill/distill.py` for speculative decoding:",
        "it predicts the target's own next token, and is of little use alone.",
        "",
        f"- **Shape** `{options['shape']}`, {parameters / 1e6:.1f}M parameters of its own,",
        f"  head trained for the {options['head']} most frequent tokens (`draft_vocab.txt`).",
        *(INT8 if in_float else ()),
        f"- **Texts** {options['num_texts']} prompts with greedy answers of the target (generated",
        f"  ones of at most {options['max_tokens']} tokens): {', '.join(sources)}.",
        f"  Held out by topic: {', '.join(options['topics']) or 'none'}.",
        f"- **Training** {last['step']} steps, {last['tokens']} answer tokens,",
        f"  {last['cpu_seconds'] / 60:.0f} CPU minutes{begun}: " + _sentence(recipe) + ".",
        f"- **Licence** {options['licence']}; derived from {target}.",
        "",
        "## Acceptance on held-out prompts",
        "",
        "Share of the target's greedy tokens that the draft predicts, and acceptance length",
        f"(1 + accepted / drafts) at K = {num_speculative_tokens}.",
        "",
        *_table(found),
    ]
    if in_float:
        lines += ["", "Before its layers were quantised, in float32:", "", *_table(in_float)]
    lines += ["", "## The curve", "", "| step | answer tokens | CPU s | loss | acceptance |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {point['step']} | {point['tokens']} | {point['cpu_seconds']:.0f} | {point['loss']} "
        f"| {point['acceptance']} |"
        for point in _thinned(curve)
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _table(found: dict[str, Acceptance]) -> list[str]:
    head = ["| prompts | per-token acceptance | acceptance length | tokens |", "|---|---|---|---|"]
    return head + [
        f"| {name} | {one.mean:.3f} | {one.length:.2f} | {one.tokens} |"
        for name, one in found.items()
    ]


def _sentence(recipe: Recipe) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(recipe).items())


def _thinned(curve: list[dict[str, float]], most: int = 20) -> list[dict[str, float]]:
    """At most about so many points, the last among them."""
    every = max(1, len(curve) // most)
    return curve[::-1][::every][::-1]
