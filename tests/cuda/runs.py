"""The engines that the checks look at: each is started once, when a check first asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from tests.cuda.draft_alone import Alone, DraftFound, decode
from tests.cuda.engines import Found, Work, use
from tests.cuda.explained import LOG_CHARACTERS
from tests.cuda.machine import Machine
from tests.cuda.verdicts import SkippedError
from vllm_ssd.cli.engine_process import EngineError, run_apart

DEPTH = 4
"""K."""
BRANCHES = 8
BATCH = 8
"""The largest batch."""
WAITS = {"backup": "none", "max_wait_ms": 2000.0}
"""Look-ups wait until the draft is there: what is looked for must not depend on its speed."""
ENGINE_SECONDS = 240
"""How long an engine may take, compilation and CUDA graphs included."""
ROWS = (1, 2, 4, 8)
"""Rows of the draft alone, and the full batch besides."""

Spec = TypeVar("Spec")
Result = TypeVar("Result")


class Models(NamedTuple):
    """A pair."""

    target: str
    draft: str
    questions: list[str] | None
    """What is asked; None: texts of random tokens, for a model without a chat format."""


class Placement(NamedTuple):
    """Where the draft is."""

    name: str
    options: dict[str, Any]


class Effort(NamedTuple):
    """How much is measured."""

    sizes: tuple[int, ...]
    """Batch sizes whose speed is measured; none: the engines that serve for that alone are left
    out."""
    rounds: int
    """Rounds in which steps are watched."""
    draft_steps: int
    seconds: float
    """No engine is started later."""


class Runs:
    """Engines by what they are for.

    Args:
        machine: where they run.
        models: target and draft.
        effort: how much is measured.
        tell: takes a line about what is going on.
    """

    def __init__(
        self, machine: Machine, models: Models, effort: Effort, tell: Callable[[str], None]
    ) -> None:
        self.machine, self.models, self.effort = machine, models, effort
        self._tell = tell
        self._results: dict[str, Any] = {}
        """By what was asked for: what was found, or the error."""
        self._until = time.monotonic() + effort.seconds

    # ---- engines

    def plain_exact(self) -> Found:
        """vLLM alone, in float32, texts computed alike in batches of any shape."""
        return self._engine("plain vLLM, exact", self._exact(None))

    def ssd_exact(self) -> Found:
        """The same with SSD."""
        return self._engine("SSD, exact", self._exact(self._forced(self.placements[0])))

    def ssd_exact_on_v2(self) -> Found:
        """The same on vLLM's V2 runner."""
        work = self._exact(self._ssd(self.placements[0], {"num_speculative_tokens": DEPTH}), "1")
        return self._engine("SSD on V2, exact", replace(work, counts_waits=True))

    def watched(self, placement: Placement) -> Found:
        """SSD in the usual type, its steps watched."""
        return self._engine(
            f"SSD, {placement.name}, watched",
            replace(
                self._work(self._forced(placement), "0"),
                forced=True,
                watched_rounds=self.effort.rounds,
                counts_waits=True,
            ),
        )

    def plain(self, runner: str | None = None) -> Found:
        """vLLM alone, as it is used; ``runner`` is ``"0"`` or ``"1"`` to choose V1 or V2."""
        return self._fast("plain vLLM" + _on(runner), None, runner)

    def draft_model(self) -> Found:
        """vLLM's own method, with the same draft."""
        options = {
            "method": "draft_model",
            "model": self.models.draft,
            "num_speculative_tokens": DEPTH,
        }
        return self._fast("draft_model", options, None)

    def ssd(self, placement: Placement, runner: str = "0") -> Found:
        """SSD as it is used: it decides by itself whether and how much to speculate."""
        options = self._ssd(placement, {"num_speculative_tokens": DEPTH})
        return self._fast(f"SSD, {placement.name}" + _on(runner), options, runner)

    def draft_alone(self, placement: Placement) -> DraftFound:
        """The draft of :meth:`watched`, without a target."""
        watched = self.watched(placement)
        planned = watched.marks.planned
        assert planned is not None
        rows = sorted({*ROWS, planned.rows, self._rows_beside(watched)})
        alone = Alone(
            planned=planned,
            rows=[each for each in rows if each <= planned.rows],
            steps=self.effort.draft_steps,
            limit_s=ENGINE_SECONDS,
        )
        return self._once("the draft alone", decode, alone)

    @property
    def placements(self) -> list[Placement]:
        """Where the draft can be: the first is the plugin's own choice."""
        count = len(self.machine.devices)
        if count == 0:
            return [Placement("draft on its own core", {})]
        shared = Placement("draft on the target's device", {"draft_device": "cuda:0"})
        return [Placement("draft on its own device", {}), shared] if count > 1 else [shared]

    @staticmethod
    def _rows_beside(watched: Found) -> int:
        """Rows of an average step of the draft."""
        counters = watched.watched.counters if watched.watched else {}
        return max(1, round(counters["draft_rows"] / max(1.0, counters["draft_steps"])))

    # ---- how they are started

    def _work(self, speculative_config: dict[str, Any] | None, runner: str | None) -> Work:
        cuda = self.machine.has_cuda
        return Work(
            model=self.models.target,
            speculative_config=speculative_config,
            enforce_eager=not cuda,
            dtype=None if cuda else "float32",
            environment={} if runner is None else {"VLLM_USE_V2_MODEL_RUNNER": runner},
            arguments={
                "max_num_seqs": BATCH,
                # Without a given size, so that the memory is split as planned.
                **(
                    {"gpu_memory_utilization": 0.5, "cudagraph_metrics": True}
                    if cuda
                    else {"kv_cache_memory_bytes": 128 << 20}
                ),
            },
            questions=self.models.questions,
            limit_s=ENGINE_SECONDS,
        )

    def _exact(self, speculative_config: dict[str, Any] | None, runner: str = "0") -> Work:
        work = replace(self._work(speculative_config, runner), dtype="float32")
        if speculative_config is not None and runner == "0":
            work = replace(work, forced=True)
            if not self.machine.has_cuda:
                # Here nothing tells it from the one that is watched: one engine does for both.
                work = replace(work, watched_rounds=self.effort.rounds, counts_waits=True)
        if self.machine.has_cuda and self.machine.has_batch_invariance:
            work.environment["VLLM_BATCH_INVARIANT"] = "1"
        return work

    def _fast(self, name: str, options: dict[str, Any] | None, runner: str | None) -> Found:
        if not self.effort.sizes:
            raise SkippedError("left out: --quick")
        return self._engine(name, replace(self._work(options, runner), sizes=self.effort.sizes))

    def _ssd(self, placement: Placement, options: dict[str, Any]) -> dict[str, Any]:
        # An error of the plugin must not look like plain decoding.
        common = {"method": "ssd", "model": self.models.draft, "strict": True}
        return {**common, **options, **placement.options}

    def _forced(self, placement: Placement) -> dict[str, Any]:
        options = {"num_speculative_tokens": DEPTH, "branches": BRANCHES, **WAITS}
        return self._ssd(placement, options)

    def _engine(self, name: str, work: Work) -> Found:
        return self._once(name, use, work)

    def _once(self, name: str, call: Callable[[Spec, Any], Result], spec: Spec) -> Result:
        """Run it in a process of its own, or give what it gave before."""
        key = repr(spec)
        if key not in self._results:
            if time.monotonic() > self._until:
                raise SkippedError("left out: the time is over (--minutes)")
            began = time.monotonic()
            try:
                self._results[key] = run_apart(call, spec, log_characters=LOG_CHARACTERS)
            except EngineError as error:
                self._results[key] = error
            how = "failed" if isinstance(self._results[key], EngineError) else "done"
            self._tell(f"{name}: {how} in {time.monotonic() - began:.0f} s")
        result = self._results[key]
        if isinstance(result, EngineError):
            raise EngineError(f"{name}: {result}")
        return result


def _on(runner: str | None) -> str:
    return {None: "", "0": " on V1", "1": " on V2"}[runner]
