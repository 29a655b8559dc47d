"""Engines shared between tests: a start takes ten seconds, so as few as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.engine.byte_models import byte_models
from tests.engine.harness import LONG_WAIT_MS, Pair, Spec
from tests.tiny_models import TinyModels

SPECS = {
    # A random draft hits by chance only: 60 of 512 tokens are guessed after each miss.
    "random": Spec("random", 2, {"fan_out": 20, "branches": 60, "max_wait_ms": LONG_WAIT_MS}),
    # Most of its proposals are partly wrong, and a short wait leaves drafts partly done.
    "near": Spec("near", 5, {"fan_out": 4, "max_wait_ms": 10.0}),
    "itself": Spec("itself", 4, {"max_wait_ms": LONG_WAIT_MS}),
}


@pytest.fixture(scope="package")
def models(tiny_pair: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The tiny models, able to write any text."""
    return byte_models(tiny_pair, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="package")
def running() -> Iterator[list[Pair]]:
    """The pair of engines that runs now; empty if none does."""
    pairs: list[Pair] = []
    yield pairs
    if pairs:
        pairs[0].close()


@pytest.fixture(scope="package")
def stop_pair(running: list[Pair]) -> Callable[[], None]:
    """Ends the running pair, for a test that starts engines of its own."""

    def stop() -> None:
        if running:
            running.pop().close()

    return stop


@pytest.fixture(scope="package")
def start_pair(
    models: TinyModels, running: list[Pair], stop_pair: Callable[[], None]
) -> Callable[[Spec], Pair]:
    """Starts a pair of engines, or hands out the running one if it was started with the same."""

    def start(spec: Spec) -> Pair:
        if running and running[0].spec != spec:
            stop_pair()
        if not running:
            running.append(Pair(spec, models))
        return running[0]

    return start


@pytest.fixture(
    scope="package",
    params=[
        # The right draft has tests of its own: of its hits and of each mode.
        pytest.param(name, marks=[pytest.mark.slow] * (name == "itself"))
        for name in SPECS
    ],
)
def draft_spec(request: pytest.FixtureRequest) -> Spec:
    """A spec for each kind of draft; package scope, so that tests of one engine run together."""
    return SPECS[request.param]


@pytest.fixture
def pair(draft_spec: Spec, start_pair: Callable[[Spec], Pair]) -> Iterator[Pair]:
    """An engine for each kind of draft, and plain vLLM; no test may pass with speculation off."""
    pair = start_pair(draft_spec)
    before = pair.ssd.metric("spec_decode_num_draft_tokens")
    yield pair
    assert pair.ssd.metric("spec_decode_num_draft_tokens") > before
