"""The target's step time with SSD drafting on another core, against the same step without it.

All engines verify the same drafts, K tokens a step. SSD's come from its draft process, waited for,
so that nearly all look-ups hit. The others' come from a record of the text, with no draft anywhere:
``alone``, and ``loaded`` beside a process that only multiplies matrices of the draft's size on the
draft's core. What the second core costs the first, by memory and clock, is in both of the latter;
what SSD itself costs is the difference between ``ssd`` and ``loaded``. The forward is timed in the
worker, notices to the draft included.

    python benchmarks/step_time.py [--multiprocessing] [--depth 6] [--rounds 2] [--draft FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_ssd.cli.demo import QUESTIONS
from vllm_ssd.cli.demo_engine import best_dtype
from vllm_ssd.cli.models import demo_models

TOKENS = 120


def generate(kind: str, depth: int, draft: str, results: Any) -> None:
    """Run one engine; send its texts and step times."""
    from vllm import LLM, SamplingParams

    target = str(demo_models().target)
    extra: dict[str, Any] = {}
    if kind == "ssd":
        extra["speculative_config"] = {
            "method": "ssd",
            "model": draft,
            "num_speculative_tokens": depth,
            "max_wait_ms": 10_000.0,
            "branches": 4,
        }
        extra["worker_cls"] = "benchmarks.timed_workers.TimedSSDWorker"
    elif kind != "plain":
        extra["speculative_config"] = {
            "method": "custom_class",
            "model": "benchmarks.timed_workers.RecordedProposer",
            "num_speculative_tokens": depth,
        }
        extra["worker_cls"] = "benchmarks.timed_workers.TimedWorker"
    llm = LLM(
        model=target,
        dtype=best_dtype(),
        max_model_len=1024,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        **extra,
    )
    conversations: Any = [[{"role": "user", "content": question}] for question in QUESTIONS]
    parameters = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    texts = []
    for conversation in conversations:
        (output,) = llm.chat([conversation], parameters, use_tqdm=False)
        texts.append([*(output.prompt_token_ids or []), *output.outputs[0].token_ids])
    times = [] if kind == "plain" else llm.collective_rpc("step_times")[0]
    results.send((texts, times))


def multiply(megabytes: int, core: int) -> None:
    """Multiply matrices of this size in all by the rows of a draft's step, on one core, for ever.

    Args:
        megabytes: of float32 weights.
        core: where.
    """
    import torch

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    weights = [torch.randn(1536, 1536) for _ in range(max(1, megabytes // 9))]
    inputs = torch.randn(24, 1536)
    while True:
        for weight in weights:
            torch.nn.functional.linear(inputs, weight)


@contextmanager
def load(draft: str, core: int) -> Iterator[None]:
    """A process that does the arithmetic of a draft and nothing else."""
    size = sum(file.stat().st_size for file in Path(draft).glob("*.safetensors"))
    # Stored in bfloat16, computed in float32.
    process = multiprocessing.get_context("spawn").Process(
        target=multiply, args=(2 * size >> 20, core), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def run(kind: str, depth: int, draft: str) -> tuple[list[list[int]], list[tuple[int, float]]]:
    """One engine in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=generate, args=(kind, depth, draft, theirs))
    process.start()
    theirs.close()
    try:
        texts, times = ours.recv()
    finally:
        process.join()
    return texts, times


def main() -> None:
    """Record the text, then run both engines alternately and compare their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--multiprocessing", action="store_true", help="vLLM's worker processes")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--draft", default=None, help="default: the demonstration's")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(options.multiprocessing))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Each engine's process, and vLLM's workers, import this folder's workers by name.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = root
    draft = options.draft or str(demo_models().draft)
    times: dict[str, list[float]] = {"alone": [], "loaded": [], "ssd": []}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "texts.json"
        os.environ["VLLM_SSD_BENCHMARK_TEXTS"] = str(record)
        # One core for the target in every engine, as SSD leaves it on two.
        cores = sorted(os.sched_getaffinity(0))
        texts, _ = run("plain", options.depth, draft)
        record.write_text(json.dumps(texts))
        for _ in range(options.rounds):
            for kind in times:
                other = load(draft, cores[-1]) if kind == "loaded" else nullcontext()
                with other:
                    if kind != "ssd" and not options.multiprocessing:
                        os.sched_setaffinity(0, cores[:-1] or cores)
                    _, steps = run(kind, options.depth, draft)
                    os.sched_setaffinity(0, cores)
                wanted = [s for tokens, s in steps if tokens == options.depth + 1]
                times[kind] += wanted[5:]
    table = Table(title=f"one forward of {options.depth + 1} query tokens")
    for column in ("", "steps", "median", "to alone", "to loaded"):
        table.add_column(column, justify="right")
    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    for kind, median in medians.items():
        ratios = [f"{median / medians[base]:.3f}" for base in ("alone", "loaded")]
        table.add_row(kind, str(len(times[kind])), f"{1e3 * median:.1f} ms", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
