"""Real engines for tests: start them, feed them requests over time, compare what they answer."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import vllm_ssd
from tests.tiny_models import TinyModels

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",  # bfloat16 differs between batch shapes in vLLM itself
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "block_size": 32,
    # A random model would fill a JSON text with white space for ever.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
LONG_WAIT_MS = 2000.0
"""Longer than any round of the tiny draft: its branches are always complete in time."""


@dataclass(frozen=True)
class Job:
    """One request of a workload."""

    prompt: Sequence[int]
    params: SamplingParams
    arrives: int = 0
    """The engine step before which it is added."""
    abort_after: int | None = None
    """Aborted as soon as it has so many tokens."""


@dataclass(frozen=True)
class Answer:
    """The result of one completion of a job; two engines agree when these are equal."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class Spec:
    """What a pair of engines is started with."""

    draft: str
    """``random``, ``near`` or ``itself``."""
    depth: int
    """K."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the ``ssd`` method."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments both engines get."""

    def speculative_config(self, models: TinyModels) -> dict[str, Any]:
        """The first-class spelling."""
        # With a backup a bound is waited for only while that pays: then hits are not certain.
        certain = {"backup": "none"} if "max_wait_ms" in self.options else {}
        return {
            "method": "ssd",
            "model": str(models.drafts()[self.draft]),
            "num_speculative_tokens": self.depth,
            "strict": True,  # errors of the plugin must fail the test, not cost hits
            **certain,
            **self.options,
        }


class Engine:
    """One vLLM engine.

    Args:
        model: folder of the model.
        **arguments: for ``LLM``, on top of :data:`ENGINE_ARGS`.
    """

    def __init__(self, model: str, **arguments: Any) -> None:
        from vllm import LLM

        self.llm: LLM = LLM(model=model, **{**ENGINE_ARGS, **arguments})
        self._runs = 0

    @property
    def drafter(self) -> Any:
        """The proposer, in-process."""
        core: Any = self.llm.llm_engine.engine_core
        return core.engine_core.model_executor.driver_worker.worker.model_runner.drafter

    def close(self) -> None:
        """Shut the engine down."""
        self.llm.llm_engine.engine_core.shutdown()

    def stats(self) -> dict[str, float]:
        """Counters of the speculation so far."""
        return vllm_ssd.get_stats(self.llm)

    def metric(self, name: str) -> float:
        """One of vLLM's own counters (``vllm:<name>``)."""
        metrics = self.llm.get_metrics()
        return sum(getattr(m, "value", 0.0) for m in metrics if m.name == f"vllm:{name}")

    def run(self, jobs: Sequence[Job]) -> list[list[Answer]]:
        """Feed the jobs in as they arrive, step until all are done; the answers of each job."""
        return [[_answer(c) for c in output.outputs] for output in self.run_raw(jobs)]

    def run_raw(self, jobs: Sequence[Job]) -> list[RequestOutput]:
        """As :meth:`run`, with vLLM's own outputs, those of all steps merged."""
        engine = self.llm.llm_engine
        self._runs += 1
        ids = [f"{self._runs}-{index}" for index in range(len(jobs))]
        waiting = sorted(range(len(jobs)), key=lambda i: jobs[i].arrives, reverse=True)
        outputs: dict[str, RequestOutput] = {}
        step = 0
        while waiting or engine.has_unfinished_requests():
            while waiting and (
                jobs[waiting[-1]].arrives <= step or not engine.has_unfinished_requests()
            ):
                index = waiting.pop()
                prompt: Any = {"prompt_token_ids": list(jobs[index].prompt)}
                engine.add_request(ids[index], prompt, jobs[index].params.clone())
            for output in engine.step():
                known = outputs.get(output.request_id, output)
                # Of several completions a step reports only those that grew.
                output.outputs = _merged(known.outputs, output.outputs)
                outputs[output.request_id] = output
                abort_after = jobs[ids.index(output.request_id)].abort_after
                enough = abort_after is not None and (
                    len(output.outputs[0].token_ids) >= abort_after
                )
                if enough and not output.finished:
                    engine.abort_request([output.request_id])
            step += 1
        return [outputs[request_id] for request_id in ids]


class Pair:
    """An engine with SSD and one without, started with the same arguments.

    Args:
        spec: what they are started with.
        models: the target and its drafts.
    """

    _answers: ClassVar[dict[bytes, list[list[Answer]]]] = {}
    """The plain engines' answers, by their arguments and the jobs: they do not change."""

    def __init__(self, spec: Spec, models: TinyModels) -> None:
        self.spec = spec
        self._target = str(models.target)
        self.ssd = Engine(
            self._target,
            **spec.engine,
            speculative_config=spec.speculative_config(models),
            disable_log_stats=False,
        )

    @cached_property
    def plain(self) -> Engine:
        """The engine without SSD, started when it is first used."""
        return Engine(self._target, **self.spec.engine)

    def close(self) -> None:
        """Shut both engines down."""
        # Closing one destroys vLLM's process groups, which both use: never close one alone.
        self.ssd.close()
        if "plain" in self.__dict__:
            self.plain.close()

    def expected(self, jobs: Sequence[Job]) -> list[list[Answer]]:
        """The plain engine's answers to the jobs, without aborts."""
        whole = [Job(job.prompt, job.params, job.arrives) for job in jobs]
        key = pickle.dumps((self._target, self.spec.engine, whole))
        if key not in self._answers:
            self._answers[key] = self.plain.run(whole)
        return self._answers[key]

    @contextmanager
    def watched_proposals(self) -> Iterator[set[int]]:
        """The tokens that are proposed meanwhile, as they come."""
        drafter = self.ssd.drafter
        propose = drafter.propose
        proposed: set[int] = set()

        def watch(*arguments: Any, **named: Any) -> Sequence[Sequence[int]]:
            drafts: Sequence[Sequence[int]] = propose(*arguments, **named)
            proposed.update(token for draft in drafts for token in draft)
            return drafts

        drafter.propose = watch
        try:
            yield proposed
        finally:
            drafter.propose = propose

    def check_identical(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Run the jobs on both engines and compare.

        Returns:
            By how much each counter of the speculation grew.
        """
        expected = self.expected(jobs)
        before = self.ssd.stats()
        found = self.ssd.run(jobs)
        grown = difference(self.ssd.stats(), before)
        assert_identical(jobs, expected, found)
        # Without speculation the comparison would prove nothing.
        assert grown["look_ups"] > 0
        assert grown["misses_draft_down"] == grown["errors"] == grown["resyncs"] == 0
        return grown


def assert_identical(
    jobs: Sequence[Job], expected: Sequence[list[Answer]], found: Sequence[list[Answer]]
) -> None:
    """Fail at the first token that differs. Aborted jobs must have a prefix of their answer."""
    for index, (job, wanted, got) in enumerate(zip(jobs, expected, found, strict=True)):
        for want, have in zip(wanted, got, strict=True):
            tokens = want.tokens
            if job.abort_after is not None:
                assert len(have.tokens) >= min(job.abort_after, len(tokens))
                tokens = tokens[: len(have.tokens)]
            same = next(
                (i for i, (a, b) in enumerate(zip(tokens, have.tokens, strict=False)) if a != b),
                min(len(tokens), len(have.tokens)),
            )
            assert have.tokens == tokens, f"job {index} differs from output token {same} on"
            if job.abort_after is None:
                assert have == want, f"job {index} has the same tokens but differs"


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Growth of each counter."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def hit_rate_after_first(stats: dict[str, float]) -> float:
    """Of the look-ups after the first one of each request, how many hit."""
    return (stats["hits"] - stats["first_hits"]) / (stats["look_ups"] - stats["first_look_ups"])


def greedy(max_tokens: int | None = 32, **others: Any) -> SamplingParams:
    """Greedy decoding to ``max_tokens``, whatever the tokens are."""
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **others}
    )


def prompt(length: int, salt: int = 0) -> list[int]:
    """A prompt of ``length`` tokens; other salts share no prefix with it beyond the first token."""
    return [1] + [(131 * salt + 7 * i * (salt + 1)) % 500 + 5 for i in range(1, length)]


def staggered(lengths: Iterable[int], every: int, params: SamplingParams) -> list[Job]:
    """Requests with prompts of these lengths, one arriving every few steps."""
    return [
        Job(prompt(length, salt), params, arrives=salt * every)
        for salt, length in enumerate(lengths)
    ]


def _merged(known: Sequence[Any], grown: Sequence[Any]) -> list[Any]:
    by_index = {completion.index: completion for completion in (*known, *grown)}
    return [by_index[index] for index in sorted(by_index)]


def _answer(completion: Any) -> Answer:
    return Answer(
        tuple(completion.token_ids),
        completion.text,
        completion.finish_reason,
        completion.stop_reason,
    )
