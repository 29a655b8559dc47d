"""The time that a smaller head saves in a draft's step, and the agreement with the target it costs.

One process for each size of the head, each with one thread on one core, as a draft process has;
they take turns. A step decodes rows that share a text, as forks do. The agreement is that of the
draft's first choice with held-out answers of the target, the text before each token being given:
``--answers`` takes a file, gzipped or not, of lines ``{"p": [prompt ids], "a": [answer ids]}``.

    python benchmarks/draft_vocab.py [--draft FOLDER] [--vocab FILE] [--answers FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_ssd.cli.engine_process import best_dtype
from vllm_ssd.cli.models import demo_models
from vllm_ssd.config import SSDConfig
from vllm_ssd.core.arrays import Int32Array

SIZES = "2000,4000,8000,16000,0"
ROWS = (1, 8, 24)
CANDIDATES = 25
BLOCK = 32
KV_BYTES = 128 << 20
MAX_ANSWER_TEXT = 1024


def serve(pipe: Connection, draft: str, ids: Int32Array | None, eager: bool, core: int) -> None:
    """A process's entry point: bring the draft up, then time the steps asked for."""
    os.sched_setaffinity(0, [core])
    from vllm.platforms import current_platform

    from vllm_ssd.draft.model import BlockChanges, Sequences
    from vllm_ssd.draft.vllm_model import VllmDraftModel

    arguments: dict[str, Any] = {
        "model": draft,
        "dtype": best_dtype(),
        "max_model_len": 2048,
        "max_num_seqs": max(ROWS),
        "max_num_batched_tokens": max(ROWS) + 256,
        "enforce_eager": eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": KV_BYTES,
    }
    if current_platform.is_cpu():
        arguments["block_size"] = BLOCK
    model = VllmDraftModel(arguments)
    vocab_size = model.config.model_config.get_vocab_size()
    model.load(vocab_size, ids)
    model.allocate(KV_BYTES, CANDIDATES)
    pipe.send(None)
    try:
        while True:
            rows, context, steps = pipe.recv()
            shared = context // model.block_size
            tables = np.tile(np.arange(1, shared + 2, dtype=np.int32), (rows, 1))
            tables[:, -1] = 1 + shared + np.arange(rows)
            every = np.arange(rows, dtype=np.int32)
            sequences = Sequences(
                rows=every,
                query_lens=np.ones(rows, np.int32),
                tokens=np.arange(3, 3 + rows, dtype=np.int32),
                positions=np.full(rows, shared * model.block_size, np.int32),
            )
            changes = BlockChanges.of_tables(every, tables)
            seconds = []
            for _ in range(steps):
                began = time.perf_counter()
                model.launch(changes, sequences).result()
                seconds.append(time.perf_counter() - began)
                changes = BlockChanges.of_tables(every[:0], tables[:0])
            pipe.send(seconds[3:])
    except EOFError:
        os._exit(0)


def heads(draft: str, sizes: list[int], listed: Path | None) -> dict[int, Int32Array | None]:
    """The tokens of each size of the head.

    Args:
        draft: the draft's folder.
        sizes: how many tokens; 0 for all.
        listed: file of token ids by frequency; default: the draft's own, else the lowest ids.
    """
    if listed is not None:
        ids = np.loadtxt(listed, dtype=np.int32, comments="#")
        return {size: ids[:size] if size else None for size in sizes}
    from vllm.config import ModelConfig

    from vllm_ssd.draft_vocab import select_draft_vocab

    model = ModelConfig(model=draft)
    found: dict[int, Int32Array | None] = {}
    for size in sizes:
        options = SSDConfig(model=draft, num_speculative_tokens=1, draft_vocab=size)
        try:
            found[size] = select_draft_vocab(options, model, model)
        except ValueError as error:
            print(f"left out: {error}")
    return found


def step_times(
    draft: str, found: dict[int, Int32Array | None], options: argparse.Namespace
) -> dict[tuple[int, int], float]:
    """Median seconds of a step, by size of the head and rows."""
    context = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0))
    pipes, processes = {}, []
    for size, ids in found.items():
        pipes[size], theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, draft, ids, options.eager, core), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes[size].recv()
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(options.rounds):
        for rows in ROWS:
            for size, pipe in pipes.items():
                pipe.send((rows, options.context, options.steps))
                seconds.setdefault((size, rows), []).extend(pipe.recv())
    for pipe in pipes.values():
        pipe.close()
    for process in processes:
        process.join()
    return {key: statistics.median(values) for key, values in seconds.items()}


def agreements(
    draft: str, found: dict[int, Int32Array | None], answers: Path, texts: int
) -> dict[int, float]:
    """Share of the answers' tokens that are the draft's first choice, by size of the head."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
    right, total = dict.fromkeys(found, 0), 0
    opened: Any = gzip.open if answers.suffix == ".gz" else open
    with opened(answers, "rt") as lines, torch.inference_mode():
        for _, line in zip(range(texts), lines, strict=False):
            text = json.loads(line)
            tokens = torch.tensor(text["p"] + text["a"])[:MAX_ANSWER_TEXT]
            first = len(text["p"])
            if first >= len(tokens):
                continue
            logits = model(tokens[None]).logits[0, first - 1 : -1]
            total += len(tokens) - first
            for size, ids in found.items():
                if ids is None:
                    choices = logits.argmax(-1)
                else:
                    selected = torch.from_numpy(ids).long()
                    choices = selected[logits[:, selected].argmax(-1)]
                right[size] += int((choices == tokens[first:]).sum())
    return {size: count / total for size, count in right.items()}


def main() -> None:
    """Time the steps, then compare with the answers, if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draft", help="folder of the draft; default: the demonstration's")
    parser.add_argument("--answers", type=Path, help="held-out answers of the target")
    parser.add_argument("--sizes", default=SIZES, help="tokens of the heads; 0 is the whole head")
    parser.add_argument("--vocab", type=Path, help="token ids by frequency; default: the draft's")
    parser.add_argument("--texts", type=int, default=100, help="how many of them")
    parser.add_argument("--context", type=int, default=256, help="tokens before those decoded")
    parser.add_argument("--steps", type=int, default=30, help="steps in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each process")
    parser.add_argument("--eager", action="store_true", help="do not compile the draft")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.update(OMP_NUM_THREADS="1", VLLM_USE_V2_MODEL_RUNNER="0")
    draft = options.draft or str(demo_models().draft)
    sizes = [int(size) for size in options.sizes.split(",")]
    found = heads(draft, sizes, options.vocab)
    times = step_times(draft, found, options)
    shares = {}
    if options.answers:
        shares = agreements(draft, found, options.answers, options.texts)
    table = Table(title="a step of the draft, median, by rows; agreement with the target")
    for column in ("head", *(f"rows: {rows}" for rows in ROWS), "agreement"):
        table.add_column(column, justify="right")
    for size, ids in found.items():
        cells = [f"{1e3 * times[size, rows]:.2f} ms" for rows in ROWS]
        share = f"{100 * shares[size]:.2f} %" if shares else ""
        table.add_row("whole" if ids is None else str(len(ids)), *cells, share)
    Console().print(table)


if __name__ == "__main__":
    main()
