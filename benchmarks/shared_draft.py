"""Several engines at one draft server, against a draft process each; and what a network costs.

All drafts run on the last core, all engines on the first. Each engine answers one request after the
other, MT-Bench in an order of its own; what is counted are the seconds in which all of them decode.

    python -m benchmarks.shared_draft [--rounds 3] [--seconds 20] [--delays-ms 0,0.2,1,5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.draft_server import draft_server
from benchmarks.engines import more_ssd_options, numbers, ssd, wide_console
from benchmarks.load import KV_BYTES, Streams
from benchmarks.prompts import prompts
from tests.shared.relay import Relay
from vllm_ssd.affinity import available_cores
from vllm_ssd.cli.engine_process import (
    EngineSpec,
    best_dtype,
    chat,
    counters,
    difference,
    run_apart,
    start_engine,
)
from vllm_ssd.cli.models import demo_models

WARM_UP_ANSWERS = 2
FURTHER = 17
"""Each engine begins so many prompts further than the one before."""


@dataclass(kw_only=True)
class Shift(EngineSpec):
    """What one engine is to do beside others."""

    prompts: list[str]
    seconds: float
    max_tokens: int
    together: Any
    """A barrier for all engines."""


class Done(NamedTuple):
    """What one engine has done in the counted seconds."""

    tokens: int
    seconds: float
    counters: dict[str, float]


def work(shift: Shift, tell: Callable[[Any], None]) -> Done:
    """Decode beside the other engines: what runs in an engine's process."""
    engine = start_engine(shift, kv_cache_memory_bytes=KV_BYTES, enable_prefix_caching=False)
    texts = [chat(engine, prompt)["prompt_token_ids"] for prompt in shift.prompts]
    streams = Streams(engine, texts, 1, shift.max_tokens, 0.0)
    streams.run(WARM_UP_ANSWERS)
    shift.together.wait()
    before, began, tokens = counters(engine), time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < shift.seconds:
        tokens += streams.run(1).tokens
    found = difference(before, counters(engine))
    streams.run(1)  # others still count: none may have the core for itself
    return Done(tokens, seconds, found)


def measure(config: dict[str, Any], count: int, options: argparse.Namespace) -> list[Done]:
    """Run so many engines at once."""
    together = multiprocessing.get_context("spawn").Barrier(count)
    shifts = [
        Shift(
            model=str(demo_models().target),
            speculative_config=config,
            enforce_eager=True,
            dtype=options.dtype,
            # Beside a draft of its own the plugin puts the target there.
            cores=None if "model" in config else available_cores()[:1],
            prompts=prompts("mt-bench")[FURTHER * index :],
            seconds=options.seconds,
            max_tokens=options.max_tokens,
            together=together,
        )
        for index in range(count)
    ]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda shift: run_apart(work, shift), shifts))


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="counted, of each engine")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--dtype", default=best_dtype())
    parser.add_argument("--engines", type=numbers, default=[1, 2], help="how many at once")
    parser.add_argument(
        "--delays-ms",
        type=lambda text: [float(part) for part in text.split(",") if part],
        default=[0.0, 0.2, 1.0, 5.0],
        help="each way, between one engine and the server",
    )
    parser.add_argument("--ssd", type=more_ssd_options, default={}, help="further options, JSON")
    options = parser.parse_args()
    if options.dtype == "auto":
        options.dtype = "bfloat16"
    k = {"num_speculative_tokens": 4, **options.ssd}
    own = ssd(str(demo_models().draft), k)
    found: dict[str, list[list[Done]]] = {}
    console = wide_console()

    def add(name: str, config: dict[str, Any], count: int) -> None:
        found.setdefault(name, []).append(measure(config, count, options))
        console.print(_row(name, found[name][-1:]))

    for _ in range(options.rounds):
        for count in options.engines:
            add(f"{count} x a draft process of its own", own, count)
        port = free_port()
        draft = str(demo_models().draft)
        with draft_server(draft, options.dtype, port=port) as address:
            shared = {"method": "ssd", **address, **k}
            for count in options.engines:
                add(f"{count} x a shared draft", shared, count)
            for delay in options.delays_ms:
                relay = Relay(port, 1e-3 * delay)
                add(
                    f"1 x a shared draft, {delay:g} ms each way",
                    {**shared, "draft_address": relay.address},
                    1,
                )
                relay.close()
    table = Table(title="MT-Bench, one request after the other in each engine")
    for column in ("", "tokens/s of each", "in all", "hit rate", "mean depth at a hit"):
        table.add_column(column, justify="right")
    for name, rounds in found.items():
        table.add_row(*_row(name, rounds))
    console.print(table)


def _row(name: str, rounds: list[list[Done]]) -> tuple[str, ...]:
    """Medians of the rounds."""
    rates = [[done.tokens / done.seconds for done in one] for one in rounds]
    each = [statistics.median(one) for one in zip(*rates, strict=True)]
    total = [
        {name: sum(done.counters[name] for done in one) for name in one[0].counters}
        for one in rounds
    ]
    hits = statistics.median(one["hits"] / max(1.0, one["look_ups"]) for one in total)
    depth = statistics.median(one["depth_at_hit"] / max(1.0, one["hits"]) for one in total)
    return (
        name,
        " ".join(f"{rate:.1f}" for rate in each),
        f"{statistics.median(map(sum, rates)):.1f}",
        f"{hits:.3f}",
        f"{depth:.2f}",
    )


if __name__ == "__main__":
    main()
