"""vLLM's own OpenAI server with SSD, started by ``vllm-ssd serve``, used by a real client."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS, TEXTS
from tests.robustness.scripts import START_SECONDS, Script
from tests.tiny_models import TinyModels, words

pytestmark = pytest.mark.slow


class Server(Script):
    """The server and a client of it.

    Args:
        models: target and draft.
        folder: its directory for temporary files.
    """

    def __init__(self, models: TinyModels, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = {
            "served-model-name": "tiny",
            "host": "127.0.0.1",
            "port": port,
            "dtype": harness.ENGINE["dtype"],
            "max-model-len": harness.ENGINE["max_model_len"],
            "max-num-seqs": harness.ENGINE["max_num_seqs"],
            "speculative-config": json.dumps(harness.ssd_options(models.near)),
        }
        command = ["-m", "vllm_ssd.cli.main", "serve", str(models.target), "--enforce-eager"]
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        super().__init__(command, folder, {"VLLM_SERVER_DEV_MODE": "1"})
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def is_healthy(self) -> bool:
        """Whether it answers."""
        assert self.running, "the server has ended"
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """The value of one of vLLM's Prometheus counters."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def complete(self, text: list[int], stream: bool) -> list[int]:
        """The tokens it answers with, checked against the text that comes along."""
        answer: Any = self.client.completions.create(
            model="tiny",
            prompt=text,
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            stream=stream,
            extra_body={"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False},
        )
        choices = (
            [chunk.choices[0] for chunk in answer if chunk.choices] if stream else answer.choices
        )
        tokens = [token for choice in choices for token in choice.token_ids or ()]
        said = "".join(choice.text for choice in choices)
        plain_words = [word for word in words(*tokens).split() if int(word[1:]) > 2]
        assert [word for word in said.split() if word.startswith("w")] == plain_words
        return tokens


@pytest.fixture(scope="module")
def server(
    tiny_pair: TinyModels, plain_answers: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The one server of this file; the plain engine has ended before it starts."""
    running = Server(tiny_pair, tmp_path_factory.mktemp("server"))
    try:
        harness.wait_for(running.is_healthy, START_SECONDS, "a healthy server")
        yield running
    finally:
        running.end()


def test_concurrent_answers_streamed_or_not_are_plain_vllms(
    server: Server, expected: list[list[int]]
) -> None:
    asked = [(i, stream) for i in range(len(TEXTS)) for stream in (False, True)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda a: server.complete(TEXTS[a[0]], a[1]), asked))
    for (i, _), answer in zip(asked, answers, strict=True):
        assert answer == expected[i]


def test_metrics_count_drafts(server: Server, expected: list[list[int]]) -> None:
    assert server.complete(TEXTS[0], stream=False) == expected[0]
    assert server.metric("vllm:spec_decode_num_drafts_total") > 0
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted <= server.metric("vllm:spec_decode_num_draft_tokens_total")


def test_counters_are_read_over_http(server: Server) -> None:
    request = urllib.request.Request(
        f"{server.url}/collective_rpc",
        json.dumps({"method": "ssd_stats"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = json.loads(answer.read())
    (stats,) = said["results"]
    assert stats["hits"] > 0


def test_client_that_goes_away_disturbs_no_other_request(
    server: Server, expected: list[list[int]]
) -> None:
    stream: Any = server.client.completions.create(
        model="tiny", prompt=TEXTS[0], max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert server.complete(TEXTS[1], stream=True) == expected[1]


def test_server_answers_on_while_its_draft_is_replaced(
    server: Server, expected: list[list[int]]
) -> None:
    (killed,) = server.drafts()

    def answers_rightly() -> None:
        for text, answer in zip(TEXTS, expected, strict=True):
            assert server.complete(text, stream=True) == answer

    with ThreadPoolExecutor(1) as thread:
        answering = thread.submit(answers_rightly)
        os.kill(killed, signal.SIGKILL)
        answering.result()

    def drafts_again() -> bool:
        before = server.metric("vllm:spec_decode_num_drafts_total")
        answers_rightly()
        return server.metric("vllm:spec_decode_num_drafts_total") > before

    harness.wait_for(drafts_again, harness.RECOVERY_SECONDS, "drafts of a new process")
    assert killed not in server.drafts()


def test_server_stopped_by_a_signal_leaves_nothing(server: Server) -> None:
    assert len(server.drafts()) == 1
    server.signal(signal.SIGTERM)
    assert server.wait(START_SECONDS) == 0
    server.assert_nothing_left()


def test_server_interrupted_while_it_starts_leaves_nothing(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    starting = Server(tiny_pair, tmp_path)
    try:
        harness.wait_for(lambda: bool(starting.drafts()), START_SECONDS, "a draft that starts")
        starting.signal(signal.SIGINT)
        # As `vllm serve` ends: by the signal, not with a status that a command line library chose.
        assert starting.wait(START_SECONDS) == -signal.SIGINT
        starting.assert_nothing_left()
    finally:
        starting.end()
