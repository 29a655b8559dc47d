"""vLLM's own OpenAI server, started by ``vllm-ssd serve``, and a real client of it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS
from tests.robustness.scripts import Script
from tests.shared.servers import free_port
from tests.tiny_models import TinyModels, words


class Server(Script):
    """The server and a client of it.

    Args:
        target: the model.
        folder: its directory for temporary files.
        environment: settings beside the test's own.
        wrapper: a command that runs the server as its arguments.
        **more: of the server's options; ``True`` for one without a value.
    """

    def __init__(
        self,
        target: Path,
        folder: Path,
        environment: dict[str, str] | None = None,
        wrapper: Sequence[str] = (),
        **more: Any,
    ) -> None:
        port = free_port()
        arguments = {
            "served-model-name": "tiny",
            "host": "127.0.0.1",
            "port": port,
            "dtype": harness.ENGINE["dtype"],
            "max-model-len": harness.ENGINE["max_model_len"],
            "max-num-seqs": harness.ENGINE["max_num_seqs"],
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        command = ["-m", "vllm_ssd.cli.main", "serve", str(target), "--enforce-eager"]
        for name, value in arguments.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_LOG_STATS_INTERVAL": "2",
            **(environment or {}),
        }
        super().__init__(command, folder, settings, wrapper)
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
        return sum(value for one, _, value in self.metrics() if one == name)

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Everything on its ``/metrics``: name, labels, value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return [(one.name, one.labels, one.value) for family in families for one in family.samples]

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


def tiny_server(models: TinyModels, folder: Path, **more: Any) -> Server:
    """A server of the tiny models."""
    options = json.dumps(harness.ssd_options(models.near))
    return Server(models.target, folder, speculative_config=options, **more)


def stats_of(server: Server) -> dict[str, float]:
    """Ours, over the development endpoint."""
    request = urllib.request.Request(
        f"{server.url}/collective_rpc",
        json.dumps({"method": "ssd_stats"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = json.loads(answer.read())
    (stats,) = said["results"]
    return dict(stats)
