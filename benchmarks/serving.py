"""``vllm bench serve`` against ``vllm-ssd serve``: SSD beside plain vLLM.

Plain vLLM has the cores it chooses itself, or those that SSD leaves its target. The prompts are
held-out ones, as chat, so many requests at once as ``--concurrency`` says. Servers take turns; each
is started once a round and asked at all concurrencies. Times are those of vLLM's client, which runs
on the same cores as the server.

    python -m benchmarks.serving [--rounds 2] [--concurrency 1,4,16] [--prompts 24] [--compile]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines import more_ssd_options, numbers, ssd, target_cores, wide_console
from benchmarks.prompts import SETS, prompts
from vllm_ssd.cli.engine_process import best_dtype
from vllm_ssd.cli.models import demo_models

SHOWN = {
    "output_throughput": "tokens/s",
    "mean_ttft_ms": "first token, ms",
    "mean_tpot_ms": "ms a token",
    "p99_itl_ms": "99 % of the gaps, ms",
}
"""What is shown of what ``vllm bench serve`` writes."""

Results = dict[tuple[str, int], list[dict[str, float]]]
"""By server and concurrency, a result for each round."""


@contextmanager
def server(
    config: dict[str, Any] | None, cores: list[int] | None, log: Path, options: Any
) -> Iterator[str]:
    """A server, once it is healthy: its URL.

    Args:
        config: its speculative config.
        cores: those of a plain one; None: all.
        log: its output.
        options: of the command line.

    Raises:
        RuntimeError: it ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm_ssd.cli.main", "serve", str(demo_models().target)]
    command += ["--served-model-name", "target", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", "--max-num-seqs", str(max(options.concurrency))]
    command += ["--kv-cache-memory-bytes", str(1 << 30), "--dtype", options.dtype]
    command += ["--no-enable-prefix-caching"]  # every concurrency asks the same
    command += [] if options.compile else ["--enforce-eager"]
    command += ["--speculative-config", json.dumps(config)] if config else []
    environment = dict(os.environ)
    if cores is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, texts: Path, concurrency: int, options: Any) -> dict[str, float]:
    """Run ``vllm bench serve`` and read what it has written.

    Args:
        url: of the server.
        texts: a data set of vLLM's kind "custom".
        concurrency: requests at once.
        options: of the command line.

    Raises:
        CalledProcessError: it failed.
        RuntimeError: requests failed.
    """
    count = max(options.prompts, 2 * concurrency)
    command = [sys.executable, "-m", "vllm_ssd.cli.main", "bench", "serve", "--base-url", url]
    command += ["--model", "target", "--tokenizer", str(demo_models().target), "--backend"]
    command += ["openai", "--endpoint", "/v1/completions", "--dataset-name", "custom"]
    command += ["--dataset-path", str(texts), "--custom-output-len", str(options.max_tokens)]
    command += ["--temperature", str(options.temperature), "--disable-shuffle", "--disable-tqdm"]
    command += ["--num-prompts", str(count), "--max-concurrency", str(concurrency)]
    command += ["--num-warmups", str(2 * concurrency)]
    result = texts.with_name("result.json")
    command += ["--save-result", "--result-dir", str(result.parent)]
    command += ["--result-filename", result.name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(result.read_text())
    if found["completed"] != count:
        raise RuntimeError(f"{found['completed']} of {count} requests were answered")
    return found


def table(results: Results, title: str) -> Table:
    """The median of the rounds."""
    shown = Table("", "at once", *SHOWN.values(), title=title)
    for (name, concurrency), rounds in sorted(results.items(), key=lambda item: item[0][1]):
        medians = (statistics.median(one[key] for one in rounds) for key in SHOWN)
        shown.add_row(name, str(concurrency), *(f"{value:.1f}" for value in medians))
    return shown


def rounds(options: Any, servers: dict[str, Any], folder: Path, console: Console) -> Iterator[Any]:
    """All results, as they come: the server's name, the concurrency, the result."""
    texts = folder / "texts.jsonl"
    lines = (json.dumps({"prompt": prompt}) for prompt in prompts(options.texts))
    texts.write_text("\n".join(lines))
    for number in range(options.rounds):
        for name, (config, cores) in servers.items():
            began = time.perf_counter()
            with server(config, cores, folder / "log", options) as url:
                console.print(
                    f"round {number + 1}: {name}: up after {time.perf_counter() - began:.0f} s"
                )
                for concurrency in options.concurrency:
                    yield name, concurrency, ask(url, texts, concurrency, options)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=numbers, default="1,4,16")
    parser.add_argument("--prompts", type=int, default=24, help="at least; two for each at once")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--texts", choices=SETS, default="hidden")
    parser.add_argument("--dtype", default=best_dtype())
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--ssd", type=more_ssd_options, default={}, help="its options, JSON")
    options = parser.parse_args()
    its = {"num_speculative_tokens": 4, **options.ssd}
    servers = {
        "SSD": (ssd(str(demo_models().draft), its), None),
        "plain, the target's cores": (None, target_cores(its)),
        "plain, vLLM's choice of cores": (None, None),
    }
    console = wide_console()
    results: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, concurrency, result in rounds(options, servers, Path(folder), console):
            results.setdefault((name, concurrency), []).append(result)
    title = f"{options.texts}, temperature {options.temperature:g}, {options.dtype}"
    console.print(table(results, title))


if __name__ == "__main__":
    main()
