"""The target's step time with SSD drafting on another core, against the same step without it.

One engine answers the same questions again and again, each a few seconds, in three ways in turn, so
that the machine's changes from minute to minute, and where the weights lie in its memory, are alike
for all three. All verify the same drafts, K tokens a step:

- ``alone``: from a record of the text; the draft process has nothing to do.
- ``loaded``: likewise, beside a process that only multiplies matrices of the draft's size on the
  draft's core: what a second busy core costs the first, by memory and clock.
- ``ssd``: from the draft process, waiting for its branches; only steps that verify all K tokens
  count.

Choose the number of branches so that the draft is busy during the whole verification but the target
does not wait for it: a target that has waited comes back to a colder core, which does not happen
with the default ``max_wait_ms`` of 0. How long it waited is printed.

The forward is timed in the worker, notices to the draft included. The ratios are of the medians of
one answer; their median and quartiles are printed.

    python benchmarks/step_time.py [--multiprocessing] [--depth 6] [--branches 8] [--rounds 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import vllm_ssd
from vllm_ssd.cli.demo import QUESTIONS
from vllm_ssd.cli.models import demo_models

TOKENS = 100
"""Length of an answer."""
SKIPPED = 3
"""First steps of an answer that do not count: the draft has just seen its prompt."""


class Engine:
    """The engine that is timed.

    Args:
        draft: its draft model.
        depth: K.
        branches: rows of the draft.
    """

    def __init__(self, draft: str, depth: int, branches: int) -> None:
        from vllm import LLM

        self._depth = depth
        self._llm = LLM(
            model=str(demo_models().target),
            dtype="float32",  # the three ways must give the same answers
            max_model_len=1024,
            max_num_seqs=4,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=256 << 20,
            enforce_eager=True,
            enable_prefix_caching=False,
            worker_cls="benchmarks.timed_workers.TimedWorker",
            speculative_config={
                "method": "custom_class",
                "model": "benchmarks.timed_workers.SwitchedProposer",
                "num_speculative_tokens": depth,
            },
            additional_config={
                "ssd": {
                    "model": draft,
                    "num_speculative_tokens": depth,
                    "max_wait_ms": 10_000.0,
                    "branches": branches,
                }
            },
        )

    def stats(self) -> dict[str, float]:
        """SSD's counters."""
        return vllm_ssd.get_stats(self._llm)

    def answer(self, question: str, record: list[list[int]] | None) -> tuple[list[int], float]:
        """Token ids of prompt and answer, and the median seconds of a forward of K + 1 tokens."""
        from vllm import SamplingParams

        self._llm.collective_rpc("start_timing", args=(record,))
        parameters = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        conversation: Any = [{"role": "user", "content": question}]
        (output,) = self._llm.chat([conversation], parameters, use_tqdm=False)
        steps = self._llm.collective_rpc("step_times")[0]
        wanted = [seconds for tokens, seconds in steps if tokens == self._depth + 1]
        text = [*(output.prompt_token_ids or []), *output.outputs[0].token_ids]
        return text, statistics.median(wanted[SKIPPED:] or [float("nan")])


def multiply(megabytes: int, rows: int, core: int) -> None:
    """Multiply matrices of this size in all by the rows of a draft's step, on one core, for ever.

    Args:
        megabytes: of float32 weights.
        rows: of the other factor.
        core: where.
    """
    import torch

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    weights = [torch.randn(1536, 1536) for _ in range(max(1, megabytes // 9))]
    inputs = torch.randn(rows, 1536)
    while True:
        for weight in weights:
            torch.nn.functional.linear(inputs, weight)


class Load:
    """A process that does the arithmetic of a draft and nothing else, while it is not paused."""

    def __init__(self, draft: str, rows: int, core: int) -> None:
        size = sum(file.stat().st_size for file in Path(draft).glob("*.safetensors"))
        # Stored in bfloat16, computed in float32.
        self._process = multiprocessing.get_context("spawn").Process(
            target=multiply, args=(2 * size >> 20, rows, core), daemon=True
        )
        self._process.start()
        self.pause()

    def pause(self) -> None:
        """Stop using the core."""
        os.kill(self._process.pid or 0, signal.SIGSTOP)

    def go_on(self) -> None:
        """Multiply again."""
        os.kill(self._process.pid or 0, signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def measure(engine: Engine, load: Load, rounds: int) -> list[dict[str, float]]:
    """Median seconds of a forward, by kind, of every question in every round.

    Raises:
        RuntimeError: SSD wrote another text.
    """
    record = [engine.answer(question, [])[0] for question in QUESTIONS]
    for question in QUESTIONS:  # compiles, and fills caches
        engine.answer(question, None)
    medians = []
    for number, question in enumerate(QUESTIONS * rounds):
        _, alone = engine.answer(question, record)
        load.go_on()
        _, loaded = engine.answer(question, record)
        load.pause()
        text, ssd = engine.answer(question, None)
        if text != record[number % len(QUESTIONS)]:
            raise RuntimeError(f"SSD answered {question!r} with another text")
        medians.append({"alone": alone, "loaded": loaded, "ssd": ssd})
    return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--multiprocessing", action="store_true", help="vLLM's worker processes")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--branches", type=int, default=8, help="rows of the draft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft", default=None, help="default: the demonstration's")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(options.multiprocessing))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine, and vLLM's worker processes, import this folder's worker by name.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = root
    draft = options.draft or str(demo_models().draft)
    load = Load(draft, options.branches, max(os.sched_getaffinity(0)))
    try:
        engine = Engine(draft, options.depth, options.branches)
        medians = measure(engine, load, options.rounds)
    finally:
        load.close()
    table = Table(title=f"one forward of {options.depth + 1} query tokens, {len(medians)} answers")
    for column in ("", "median", "to alone (quartiles)", "to loaded (quartiles)"):
        table.add_column(column, justify="right")
    for kind in ("alone", "loaded", "ssd"):
        cells = []
        for base in ("alone", "loaded"):
            ratios = [of_question[kind] / of_question[base] for of_question in medians]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        median = statistics.median(of_question[kind] for of_question in medians)
        table.add_row(kind, f"{1e3 * median:.1f} ms", *cells)
    console = Console()
    console.print(table)
    stats = engine.stats()
    waited = 1e3 * stats["wait_seconds"] / stats["look_ups"]
    console.print(f"hit rate {stats['hit_rate']:.0%}, {waited:.1f} ms waited a look-up")


if __name__ == "__main__":
    main()
