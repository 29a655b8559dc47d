"""What the robustness tests share: an engine stepped by hand, and processes to look at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
from vllm import LLM, SamplingParams

import vllm_ssd
from tests.decisions import AlwaysOn, deciding
from tests.tiny_models import TinyModels

if TYPE_CHECKING:
    from vllm_ssd.target.client import DraftClient

GONE_SECONDS = 2.0
"""After this time nothing may be left of an engine."""
STEP_SECONDS = 8.0
"""No step of the tiny target takes this long, however busy the machine, unless it is blocked."""
RECOVERY_SECONDS = 240.0
"""A draft starts within this time on a busy machine."""

NUM_SPECULATIVE_TOKENS = 3
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "disable_log_stats": False,
}
"""Engine arguments of all engines here: what is compared must run alike."""


def prompts(count: int, length: int = 12) -> list[list[int]]:
    """Token prompts, all different."""
    return [
        [1, *((7 * j * (i + 1) + i) % 500 + 3 for j in range(length + 3 * i))] for i in range(count)
    ]


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy decoding of just so many tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def ssd_options(draft: Path | str, **options: Any) -> dict[str, Any]:
    """The speculative config of an engine whose errors surface and whose hits are certain."""
    return {
        "method": "ssd",
        "model": str(draft),
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "fan_out": 2,
        "backup": "none",
        "max_wait_ms": 200.0,
        "strict": True,
        **options,
    }


@contextmanager
def running_engine(
    models: TinyModels, speculative: dict[str, Any] | None = None, **arguments: Any
) -> Iterator[LLM]:
    """An engine in this process, plain unless ``speculative`` is given; shut down at the end."""
    with deciding(AlwaysOn):
        llm = LLM(
            model=str(models.target), speculative_config=speculative, **{**ENGINE, **arguments}
        )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def client_of(llm: LLM) -> DraftClient:
    """The client of the draft of an engine in this process."""
    core: Any = llm.llm_engine.engine_core
    client: DraftClient = core.engine_core.model_executor.driver_worker.worker._client
    return client


def draft_pid(llm: LLM) -> int:
    """The draft process now running."""
    link = client_of(llm).link
    assert link is not None, "the draft is down"
    assert link.pid is not None
    return link.pid


class Decoding:
    """Requests that are decoded step by step, so that something can happen in mid-flight.

    Args:
        llm: an engine in this process.
        texts: token prompts.
        max_tokens: length of every answer.
    """

    _runs = 0
    _answers: ClassVar[dict[str, list[int]]] = {}
    _unfinished: ClassVar[set[str]] = set()

    def __init__(self, llm: LLM, texts: Sequence[list[int]], max_tokens: int) -> None:
        Decoding._runs += 1
        self._engine = llm.llm_engine
        self._ids = [f"run{Decoding._runs}-{i}" for i in range(len(texts))]
        self._unfinished.update(self._ids)
        self.longest_step = 0.0
        for req_id, text in zip(self._ids, texts, strict=True):
            self._engine.add_request(req_id, {"prompt_token_ids": text}, greedy(max_tokens))

    @property
    def running(self) -> bool:
        """Whether its requests are unfinished; those of other decodings do not count."""
        return not self._unfinished.isdisjoint(self._ids)

    def step(self) -> None:
        """One step of the engine, for the requests of all decodings."""
        began = time.monotonic()
        for output in self._engine.step():
            self._answers[output.request_id] = list(output.outputs[0].token_ids)
            if output.finished:
                self._unfinished.discard(output.request_id)
        self.longest_step = max(self.longest_step, time.monotonic() - began)

    def steps(self, count: int) -> None:
        """So many steps; the requests must last that long."""
        for _ in range(count):
            assert self.running, "the requests ended too early for this test"
            self.step()

    def abort(self, index: int) -> None:
        """Abort one of the requests in mid-flight."""
        self._engine.abort_request([self._ids[index]])
        self._unfinished.discard(self._ids[index])

    def finish(self) -> list[list[int]]:
        """Step to the end.

        Returns:
            Each request's tokens, in the order of the prompts.
        """
        while self.running:
            self.step()
        return [self._answers.get(req_id, []) for req_id in self._ids]


def stats(llm: LLM) -> dict[str, float]:
    """The plugin's counters."""
    return vllm_ssd.get_stats(llm)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds.

    Raises:
        AssertionError: it did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def decode_until_hits_come_back(llm: LLM, texts: Sequence[list[int]], expected: Any) -> None:
    """Decode again and again, always right, until look-ups hit and nothing is out of step."""
    max_tokens = len(expected[0])
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        before = stats(llm)
        assert Decoding(llm, texts, max_tokens).finish() == expected
        after = stats(llm)
        quiet = all(after[name] == before[name] for name in ("resyncs", "misses_draft_down"))
        if quiet and after["hits"] - before["hits"] > 0.3 * (
            after["look_ups"] - before["look_ups"]
        ):
            return
        assert time.monotonic() < deadline, f"hits did not come back: {after}"
        time.sleep(0.3)


# ---- processes


def command(pid: int) -> str:
    """Its title or command line; empty if it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline()).strip()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but is still on the list has no command."""
    return bool(command(pid))


def is_draft(pid: int) -> bool:
    """Whether this is a draft process, by its title or, while it starts, its command."""
    return command(pid).startswith("vllm_ssd draft") or "vllm_ssd.draft" in command(pid)


def in_session(session: int) -> list[int]:
    """The living processes of a session: all that a script started, whatever their parent now."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and is_alive(pid):
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


def open_files(pid: int) -> set[str]:
    """What the file descriptors of a process point to."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(descriptor))
        except OSError:
            continue  # closed meanwhile
    return found
