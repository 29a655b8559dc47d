"""What a client of the OpenAI kind asks for: a server with SSD answers as one without does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.deep_target import with_deep_target
from tests.engine.byte_models import byte_models
from tests.engine.grammars import REGEX, SCHEMA
from tests.robustness import harness
from tests.robustness.scripts import START_SECONDS
from tests.robustness.serving import Server, stats_of
from tests.tiny_models import TinyModels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLIENTS = 32
"""At once; as many as the server decodes together."""
PROMPTS = harness.prompts(CLIENTS)
MAX_TOKENS = 64
GONE = 8
"""Connections that are closed in mid-answer."""
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
CHAT: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "name three fruits"},
]
CHOICES = ["apple pie", "apricot", "banana bread"]
GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
"""Random models would fill an answer with the white space that JSON allows."""
TOLERANCE = 1e-3
"""Between log-probabilities in float32: verifying several tokens sums in another order."""


def complete(server: Server, prompt: list[int], stream: bool = False, **asked: Any) -> list[Any]:
    """The choices of an answer to token ids; streamed, one a chunk."""
    extra = {"return_token_ids": True, "skip_special_tokens": False, **asked.pop("extra", {})}
    parameters = {"max_tokens": MAX_TOKENS, "temperature": 0.0, **asked}
    answer: Any = server.client.completions.create(
        model="tiny", prompt=prompt, stream=stream, extra_body=extra, **parameters
    )
    if stream:
        return [chunk.choices[0] for chunk in answer if chunk.choices]
    return list(answer.choices)


def tokens(choices: list[Any]) -> list[int]:
    """The tokens of one answer."""
    return [token for choice in choices for token in choice.token_ids or ()]


def texts(server: Server) -> list[list[int]]:
    """The answers to all clients, each of which streams."""

    def one(prompt: list[int]) -> list[int]:
        return tokens(complete(server, prompt, stream=True, extra={"ignore_eos": True}))

    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(one, PROMPTS))


def chat(server: Server, stream: bool = False, **asked: Any) -> str:
    """What the assistant says."""
    answer: Any = server.client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=120, temperature=0.0, stream=stream, **asked
    )
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    return str(answer.choices[0].message.content)


def chats(server: Server) -> list[str]:
    """A conversation, answered at once and streamed."""
    extra = {"ignore_eos": True}
    return [chat(server, stream, extra_body=extra) for stream in (False, True)]


def structured(server: Server) -> list[str]:
    """Answers that a regular expression, a list of choices and a schema allow."""
    schema = {"name": "thing", "schema": SCHEMA}
    return [
        chat(server, extra_body={"structured_outputs": {"regex": REGEX}}),
        chat(server, extra_body={"structured_outputs": {"choice": CHOICES}}),
        chat(server, response_format={"type": "json_schema", "json_schema": schema}),
    ]


def logprobs(server: Server, stream: bool = False) -> list[tuple[str, dict[str, float]]]:
    """Of each token its name, and the log-probabilities of the three best."""
    extra = {"return_tokens_as_token_ids": True, "ignore_eos": True}
    found = []
    for choice in complete(server, PROMPTS[0], stream, logprobs=3, extra=extra):
        if choice.logprobs is not None:
            found += list(zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True))
    return found


def two_best(server: Server) -> list[list[int]]:
    """Two answers that can only be the greedy one: vLLM refuses ``n=2`` at temperature 0."""
    extra = {"top_k": 1, "ignore_eos": True}
    choices = complete(server, PROMPTS[1], n=2, temperature=1.0, extra=extra)
    assert [choice.index for choice in choices] == [0, 1]
    return [list(choice.token_ids) for choice in choices]


ASKED: list[Callable[[Server], Any]] = [texts, chats, structured, logprobs, two_best]


@pytest.fixture(scope="module")
def models(tiny_pair: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """With a tokenizer that writes any text, and a target for which speculation pays."""
    deep = with_deep_target(tiny_pair, tmp_path_factory.mktemp("deep"))
    return byte_models(deep, tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def start(models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Server]:
    """Starts a server that takes all clients at once."""
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)

    def started(**more: Any) -> Server:
        options: dict[str, Any] = {
            "chat_template": template,
            "max_num_seqs": CLIENTS,
            "structured_outputs_config": json.dumps(GRAMMARS),
            **more,
        }
        server = Server(models.target, folder, **options)
        try:
            harness.wait_for(server.is_healthy, START_SECONDS, "a healthy server")
        except BaseException:
            server.end()
            raise
        return server

    return started


@pytest.fixture(scope="module")
def plain(start: Callable[..., Server]) -> dict[str, Any]:
    """The answers of a server without speculation, by what is asked."""
    server = start()
    try:
        return {ask.__name__: ask(server) for ask in ASKED}
    finally:
        server.end()


@pytest.fixture(scope="module")
def server(
    start: Callable[..., Server], plain: dict[str, Any], models: TinyModels
) -> Iterator[Server]:
    """The server with SSD; the plain one has ended before it starts."""
    options = {"method": "ssd", "model": str(models.near), "num_speculative_tokens": 4}
    running = start(speculative_config=json.dumps({**options, "strict": True}))
    try:
        yield running
    finally:
        running.end()


@pytest.fixture(autouse=True)
def _used_and_sound(server: Server) -> Iterator[None]:
    """Every test here is answered with drafts, and without an error of the plugin's."""
    before = stats_of(server)
    yield
    after = stats_of(server)
    assert after["tokens_accepted"] > before["tokens_accepted"]
    assert after["errors"] == after["restarts"] == 0


def test_all_clients_stream_at_once(server: Server, plain: dict[str, Any]) -> None:
    assert texts(server) == plain["texts"]


def test_connections_closed_in_mid_answer_disturb_no_other(
    server: Server, plain: dict[str, Any]
) -> None:
    def go_away(number: int) -> None:
        stream: Any = server.client.completions.create(
            model="tiny",
            prompt=PROMPTS[number],
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in zip(range(1 + number), stream, strict=False):
            pass
        stream.close()

    with ThreadPoolExecutor(GONE) as others:
        gone = [others.submit(go_away, number) for number in range(GONE)]
        assert texts(server) == plain["texts"]
        for one in gone:
            one.result()
    running = "vllm:num_requests_running"
    harness.wait_for(lambda: server.metric(running) == 0, 10.0, "no request that still runs")
    assert server.metric("vllm:kv_cache_usage_perc") == 0

    before = stats_of(server)["hits"]
    complete(server, PROMPTS[0], extra={"ignore_eos": True})
    assert stats_of(server)["hits"] > before


def test_chat(server: Server, plain: dict[str, Any]) -> None:
    assert chats(server) == plain["chats"]
    assert len(set(plain["chats"])) == 1
    assert len(plain["chats"][0]) > 60


def test_structured_output(server: Server, plain: dict[str, Any]) -> None:
    by_regex, by_choice, by_schema = said = structured(server)
    assert said == plain["structured"]
    assert re.fullmatch(REGEX, by_regex)
    assert by_choice in CHOICES
    assert json.loads(by_schema).keys() == {"colour", "sizes", "name"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Server, plain: dict[str, Any], stream: bool) -> None:
    found = logprobs(server, stream)
    assert len(found) == MAX_TOKENS
    for (token, best), (plain_token, plain_best) in zip(found, plain["logprobs"], strict=True):
        assert token == plain_token
        assert best == pytest.approx(plain_best, abs=TOLERANCE)


def test_two_answers_that_are_certain(server: Server, plain: dict[str, Any]) -> None:
    one, other = two_best(server)
    assert one == other == plain["two_best"][0]


def test_two_answers_that_are_sampled(server: Server) -> None:
    extra = {"ignore_eos": True}
    choices = complete(server, PROMPTS[2], n=2, temperature=1.0, seed=7, extra=extra)
    assert [choice.index for choice in choices] == [0, 1]
    assert [len(choice.token_ids) for choice in choices] == [MAX_TOKENS] * 2
    assert choices[0].token_ids != choices[1].token_ids
