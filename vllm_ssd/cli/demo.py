"""``vllm-ssd demo``: plain vLLM, its ``draft_model`` method and SSD answer the same questions.

In bfloat16 the texts of correct engines may differ, because rounding depends on how many tokens are
computed at once. So the first question is asked again in float32, where SSD's text has to be plain
vLLM's, token by token.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_ssd.cli import CommandError
from vllm_ssd.cli.demo_engine import Answers, Questions, Said, Started, ask
from vllm_ssd.cli.engine_process import EngineError
from vllm_ssd.cli.models import demo_models

QUESTIONS = [
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain to a ten-year-old why the sky is blue.",
    "Give me five tips for learning to cook at home.",
]

PLAIN, DRAFT_MODEL, SSD = "vLLM", "draft_model", "SSD"

TEMPERATURE = 0.7
"""The questions are also answered at this temperature, unseen."""

EXACT = "float32"
"""Rounding errors are small enough in it not to change which token is the most likely one."""

console = Console()

DIFFERS = (
    "In bfloat16 the text may differ with any speculative method: rounding depends on how many "
    "tokens are computed at once."
)


def run(max_tokens: int, num_speculative_tokens: int, enforce_eager: bool = True) -> None:
    """Run the demonstration and print its table.

    Args:
        max_tokens: tokens of an answer.
        num_speculative_tokens: K of both speculative methods.
        enforce_eager: do not compile the models: they start faster and run slower.

    Raises:
        CommandError: an engine did not start or failed, or SSD's text differs in float32.
    """
    with console.status("fetching the models"):
        models = demo_models()
    speculation = {"model": str(models.draft), "num_speculative_tokens": num_speculative_tokens}
    methods: dict[str, dict[str, Any] | None] = {
        PLAIN: None,
        DRAFT_MODEL: {"method": "draft_model", **speculation},
        SSD: {"method": "ssd", **speculation},
    }
    specs = {
        name: Questions(
            model=str(models.target),
            speculative_config=method,
            enforce_eager=enforce_eager,
            prompts=QUESTIONS,
            max_tokens=max_tokens,
            again_at=TEMPERATURE,
        )
        for name, method in methods.items()
    }
    console.print(
        f"target [bold]{models.target.name}[/], draft [bold]{models.draft.name}[/], "
        f"K = {num_speculative_tokens}, greedy and at temperature {TEMPERATURE}, "
        f"one request at a time, {_cores()}"
    )
    results = {name: _ask(name, spec) for name, spec in specs.items()}

    plain, ssd = results[PLAIN], results[SSD]
    if plain.dtype != EXACT:
        plain, ssd = _answers_in_float32(specs[PLAIN], specs[SSD])
    console.print(_table(results))
    console.print(_exactness(plain, ssd))


def _cores() -> str:
    count = len(os.sched_getaffinity(0))
    return f"{count} CPU core{'s' if count > 1 else ''}"


def _ask(name: str, spec: Questions) -> Answers:
    """Start one engine, print its answers as they come, return them."""
    console.rule(f"[bold]{name}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with ExitStack() as starting:
        bar = starting.enter_context(Progress(*columns, console=console, transient=True))
        bar.add_task(f"starting {name}", total=None)
        current = -1

        def show(event: Started | Said) -> None:
            nonlocal current
            starting.close()
            if isinstance(event, Started):
                console.print(f"[dim]started in {event.seconds:.0f} s[/]")
                return
            if event.prompt != current:
                current = event.prompt
                between = "\n\n" if current else "\n"
                console.print(f"{between}[cyan]{spec.prompts[current]}[/]")
            console.print(event.text, end="", highlight=False, markup=False, soft_wrap=True)

        try:
            answers = ask(spec, show)
        except EngineError as error:
            raise CommandError(f"the engine of {name!r} failed: {error}") from None
    console.print()
    return answers


def _answers_in_float32(*specs: Questions) -> list[Answers]:
    """Answers to the first question. The engines run at once: their speed does not matter here."""
    console.rule(f"[bold]The first question again, in {EXACT}")
    exact = [replace(spec, prompts=QUESTIONS[:1], dtype=EXACT, again_at=None) for spec in specs]
    with console.status("plain vLLM and SSD answer it"), ThreadPoolExecutor() as threads:
        try:
            return list(threads.map(lambda spec: ask(spec, lambda event: None), exact))
        except EngineError as error:
            raise CommandError(f"an engine in {EXACT} failed: {error}") from None


def _table(results: dict[str, Answers]) -> Table:
    # Narrow enough for 80 columns, names included.
    table = Table(
        title=f"The same questions, three ways; then at temperature {TEMPERATURE}",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    columns = ("tokens/s", "inter-token\nlatency", "acceptance\nlength", "hit\nrate")
    for column in (*columns, "draft round /\nverification", "text"):
        table.add_column(column, justify="right", no_wrap=True)
    plain = results[PLAIN]
    if plain.dtype != EXACT and any(
        answers.token_ids != plain.token_ids for answers in results.values()
    ):
        table.caption = DIFFERS
    for name, answers in results.items():
        same = answers.token_ids == plain.token_ids
        text = "-" if name == PLAIN else "identical" if same else "differs"
        table.add_row(name, *_figures(answers), text)
    sampled = {name: answers.again for name, answers in results.items() if answers.again}
    if sampled:
        table.add_section()
    for name, answers in sampled.items():
        table.add_row(f"{name}, {TEMPERATURE}", *_figures(answers), "-")
    return table


def _figures(answers: Answers) -> list[str]:
    gaps = _tokens(answers) - len(answers.token_ids)
    return [
        f"{_tokens(answers) / answers.seconds:.1f}",
        f"{1e3 * answers.gaps / max(1, gaps):.0f} ms",
        _acceptance_length(answers.metrics),
        _hit_rate(answers.metrics),
        _times(answers.metrics),
    ]


def _exactness(plain: Answers, ssd: Answers) -> str:
    """A line that says that SSD's text is plain vLLM's.

    Args:
        plain: plain vLLM's answers, in float32.
        ssd: SSD's to the same questions, in float32.

    Raises:
        CommandError: it is not, or there was no draft.
    """
    if lost := ssd.metrics.get("misses_draft_down"):
        raise CommandError(
            f"in {EXACT} SSD had no draft at {lost:.0f} look-ups, so its text shows nothing; "
            "please report this, with all that was printed"
        )
    for question, expected, actual in zip(QUESTIONS, plain.token_ids, ssd.token_ids, strict=False):
        if actual != expected:
            pairs = zip(actual, expected, strict=False)
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            raise CommandError(
                f"in {EXACT} SSD's answer to {question!r} differs from plain vLLM's after "
                f"{same} tokens; it must not: please report this, with all that was printed"
            )
    which = "first answer" if len(plain.token_ids) == 1 else "answers"
    drafted = ssd.metrics.get("accepted_tokens", 0.0)
    return (
        f"In {EXACT}, plain vLLM's {which} and SSD's: [bold green]identical[/], "
        f"all {_tokens(plain)} tokens, {drafted:.0f} of them drafted."
    )


def _tokens(answers: Answers) -> int:
    """The number of generated tokens."""
    return sum(map(len, answers.token_ids))


def _acceptance_length(metrics: dict[str, float]) -> str:
    """1 + accepted / drafts, as vLLM logs it."""
    drafts = metrics.get("drafts", 0.0)
    return f"{1 + metrics['accepted_tokens'] / drafts:.2f}" if drafts else "-"


def _hit_rate(metrics: dict[str, float]) -> str:
    look_ups = metrics.get("look_ups", 0.0)
    return f"{100 * metrics['hits'] / look_ups:.0f} %" if look_ups else "-"


def _times(metrics: dict[str, float]) -> str:
    rounds, verifications = metrics.get("draft_rounds", 0.0), metrics.get("verify_intervals", 0.0)
    if not rounds or not verifications:
        return "-"
    draft_ms = 1e3 * metrics["draft_round_seconds"] / rounds
    verify_ms = 1e3 * metrics["verify_seconds"] / verifications
    return f"{draft_ms:.0f} ms / {verify_ms:.0f} ms"
