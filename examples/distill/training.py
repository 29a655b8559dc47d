"""Train a draft on the target's answers: cross-entropy mixed with the target's own distribution.

The head is computed for the most frequent tokens only, as the draft will be used (option
``draft_vocab``); where an answer continues with another token nothing is learned. The learning
rate rises, stays and then falls to zero, so that a run that was stopped can be prolonged: resume
from its last checkpoint with more passes.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation import acceptance, answer_states
from labels import Labels
from progress import say, track
from texts import Text, batches
from torch.nn.functional import cross_entropy, linear

WARM_UP = 50
"""Steps."""
FALL = 0.3
"""Last part of the steps, in which the learning rate falls to zero."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes, beside the texts."""

    passes: float
    batch_tokens: int
    learning_rate: float
    distillation: float
    """Share of the target's distribution in the loss, the rest is cross-entropy with the answer."""
    dtype: str
    """Of matrix products: ``float32``, or ``bfloat16`` (weights and optimizer stay in float32)."""
    seed: int


def train(
    model: Any,
    head_ids: torch.Tensor,
    texts: list[Text],
    labels: list[Labels] | None,
    held_out: list[Text],
    recipe: Recipe,
    folder: Path,
    checkpoint_steps: int = 100,
) -> None:
    """Train in place; resumes from the checkpoint in ``folder``; writes ``curve.jsonl`` there.

    Args:
        model: a causal language model with a tied head.
        head_ids: ``[N]`` int64, the tokens its head is computed for.
        texts: prompts with answers.
        labels: one for each text; None for cross-entropy alone.
        held_out: some texts to draw the curve with.
        recipe: how.
        folder: of the checkpoint and the curve.
        checkpoint_steps: steps between checkpoints.

    Raises:
        ValueError: the checkpoint is of another recipe.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = _schedule(texts, recipe)
    checkpoint, curve = folder / "checkpoint.pt", folder / "curve.jsonl"
    points: list[dict[str, float]] = []
    first = tokens = 0
    seconds = 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        _same_recipe(saved["recipe"], recipe, checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        points = saved["curve"]
        first, tokens = int(points[-1]["step"]), int(points[-1]["tokens"])
        seconds = points[-1]["cpu_seconds"]
        _write_curve(curve, points)
        say(f"training: resumed at step {first} of {len(schedule)}")
    position = torch.full((model.config.vocab_size,), -1)
    position[head_ids] = torch.arange(len(head_ids))
    began, losses = time.process_time() - seconds, []
    for step in track(range(first, len(schedule)), "training"):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, len(schedule))
        indices = schedule[step]
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            loss, count = _loss(
                model,
                head_ids,
                position,
                [texts[index] for index in indices],
                [labels[index] for index in indices] if labels else None,
                recipe.distillation,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        tokens += count
        done = step + 1
        if done % checkpoint_steps and done < len(schedule):
            continue
        point = {
            "step": done,
            "tokens": tokens,
            "cpu_seconds": round(time.process_time() - began, 1),
            "loss": round(sum(losses) / len(losses), 4),
            "acceptance": round(acceptance(model, head_ids, held_out).mean, 4),
        }
        losses = []
        points.append(point)
        say(f"training, {len(schedule)} steps: {point}")
        _save(checkpoint, model, optimizer, points, recipe)
        _write_curve(curve, points)


def _schedule(texts: list[Text], recipe: Recipe) -> list[np.ndarray]:
    """The batches of all passes; a longer run starts with those of a shorter one."""
    lengths = np.array([len(text.p) + len(text.a) for text in texts])
    steps: list[np.ndarray] = []
    whole = int(np.ceil(recipe.passes))
    for number in range(whole):
        one_pass = batches(lengths, recipe.batch_tokens, seed=recipe.seed + number)
        steps += one_pass
    return steps[: max(1, round(len(steps) * recipe.passes / whole))]


def _rate(step: int, steps: int) -> float:
    """Of the highest learning rate: up, level, and down to zero."""
    rising = (step + 1) / min(WARM_UP, max(1, steps // 10))
    falling = (steps - step) / max(1.0, FALL * steps)
    return min(1.0, rising, falling)


def _loss(
    model: Any,
    head_ids: torch.Tensor,
    position: torch.Tensor,
    texts: list[Text],
    labels: list[Labels] | None,
    distillation: float,
) -> tuple[torch.Tensor, int]:
    """Mean loss over the tokens of answers that the head has, and their number."""
    hidden, answers = answer_states(model, texts)
    wanted = position[answers]
    known = wanted >= 0
    hidden, wanted = hidden[known], wanted[known]
    logits = linear(hidden, model.lm_head.weight[head_ids]).float()
    if labels is None or not distillation:
        return cross_entropy(logits, wanted), len(wanted)
    best = torch.from_numpy(np.concatenate([label.tokens for label in labels])).long()[known]
    values = torch.from_numpy(np.concatenate([label.log_probs for label in labels]))[known]
    places = position[best]
    # The probability of tokens that the head lacks is spread over the rest in proportion.
    teacher = values.float().masked_fill(places < 0, -torch.inf).softmax(-1)
    log_probs = logits.log_softmax(-1)
    of_best = log_probs.gather(1, places.clamp(min=0))
    soft = -(teacher * of_best).sum(-1).mean()
    hard = -log_probs.gather(1, wanted[:, None]).mean()
    return distillation * soft + (1 - distillation) * hard, len(wanted)


def _same_recipe(before: dict[str, Any], recipe: Recipe, checkpoint: Path) -> None:
    for name, value in asdict(recipe).items():
        if name != "passes" and before.get(name) != value:
            raise ValueError(
                f"{checkpoint} was trained with {name} = {before.get(name)}, now it is {value}: "
                "choose another --out, or remove it to train anew"
            )


def _write_curve(path: Path, points: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(point) + "\n" for point in points))


def _save(
    path: Path, model: Any, optimizer: Any, points: list[dict[str, float]], recipe: Recipe
) -> None:
    scratch = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"curve": points, "recipe": asdict(recipe)}, scratch)
    scratch.rename(path)
