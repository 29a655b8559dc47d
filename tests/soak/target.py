"""One target of the soak: a vLLM engine under random load, which checks its own texts.

    python -m tests.soak.target SEED ADDRESS

The pool's answers are computed by plain vLLM first, in this process. Then requests arrive, are
aborted, and differ in length and temperature, until standard input closes. A line of JSON a second
says how it goes.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
_CORES = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, _CORES[:-1] or _CORES)  # the last one is the draft server's

from vllm import LLM, SamplingParams  # noqa: E402

from tests.robustness.harness import ENGINE, prompts  # noqa: E402
from tests.tiny_models import tiny_models  # noqa: E402
from vllm_ssd import get_stats  # noqa: E402

POOL = 24
LONGEST = 160
MOST = 6
"""Requests at once."""
K = 4


@dataclass
class Figures:
    """What is told once a second."""

    requests: int = 0
    """That have ended."""
    aborted: int = 0
    tokens: int = 0
    different: int = 0
    """Greedy answers that are not plain vLLM's."""
    slowest_step: float = 0.0
    """Seconds, since the line before."""
    running: bool = False
    look_ups: float = 0.0
    hits: float = 0.0
    restarts: float = 0.0
    resyncs: float = 0.0
    errors: float = 0.0


class Load:
    """Random requests to one engine.

    Args:
        llm: the engine.
        expected: greedy answers to the pool.
        seed: of the arrivals.
    """

    def __init__(self, llm: LLM, expected: list[list[int]], seed: int) -> None:
        self._engine: Any = llm.llm_engine
        self._llm = llm
        self._pool = prompts(POOL)
        self._expected = expected
        self._random = random.Random(seed)
        self._running: dict[str, tuple[int, bool]] = {}
        """Of each request: which of the pool it is, and whether it is greedy."""
        self._number = 0
        self.figures = Figures()

    def step(self) -> None:
        """Let requests arrive, abort one now and then, and decode."""
        chance = self._random
        while len(self._running) < MOST and chance.random() < 0.3:
            self._begin()
        if self._running and chance.random() < 0.003:
            name = chance.choice(sorted(self._running))
            self._engine.abort_request([name])
            del self._running[name]
            self.figures.aborted += 1
        if not self._engine.has_unfinished_requests():
            time.sleep(0.01)
            return
        began = time.monotonic()
        outputs = self._engine.step()
        figures = self.figures
        figures.slowest_step = max(figures.slowest_step, time.monotonic() - began)
        for output in outputs:
            if output.finished and output.request_id in self._running:
                self._check(output)

    def _begin(self) -> None:
        chance = self._random
        which = chance.randrange(POOL)
        greedy = chance.random() < 0.7
        parameters = SamplingParams(
            temperature=0.0 if greedy else chance.choice([0.3, 0.8, 1.2]),
            max_tokens=chance.randint(1, LONGEST),
            ignore_eos=True,
        )
        self._number += 1
        name = f"request-{self._number}"
        self._running[name] = which, greedy
        self._engine.add_request(name, {"prompt_token_ids": self._pool[which]}, parameters)

    def _check(self, output: Any) -> None:
        which, greedy = self._running.pop(output.request_id)
        said = list(output.outputs[0].token_ids)
        self.figures.requests += 1
        self.figures.tokens += len(said)
        if greedy and said != self._expected[which][: len(said)]:
            self.figures.different += 1

    def tell(self) -> None:
        """Print the figures."""
        counters = get_stats(self._llm)
        for name in ("look_ups", "hits", "restarts", "resyncs", "errors"):
            setattr(self.figures, name, counters[name])
        self.figures.running = True
        print("SOAK", json.dumps(asdict(self.figures)), flush=True)
        self.figures.slowest_step = 0.0


def main() -> None:
    """Compute what is right, then run until standard input closes."""
    seed, address = int(sys.argv[1]), sys.argv[2]
    target = str(tiny_models().target)
    greedy = SamplingParams(temperature=0.0, max_tokens=LONGEST, ignore_eos=True)
    texts: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts(POOL)]
    arguments: dict[str, Any] = {**ENGINE, "kv_cache_memory_bytes": 64 << 20}
    plain = LLM(model=target, **arguments)
    outputs = plain.generate(texts, greedy, use_tqdm=False)
    expected = [list(output.outputs[0].token_ids) for output in outputs]
    plain.llm_engine.engine_core.shutdown()
    speculative = {"method": "ssd", "draft_address": address, "num_speculative_tokens": K}
    llm = LLM(model=target, speculative_config=speculative, **arguments)
    load = Load(llm, expected, seed)
    load.tell()
    told = time.monotonic()
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        load.step()
        if time.monotonic() - told > 1.0:
            load.tell()
            told = time.monotonic()
    load.tell()


if __name__ == "__main__":
    main()
