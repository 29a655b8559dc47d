"""What cannot work is refused at once, in a sentence: by the engine, and by the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.engine.byte_models import byte_models
from tests.shared.servers import Server, new_key
from tests.tiny_models import TinyModels
from vllm_ssd.affinity import available_cores

TCP = "tcp://127.0.0.1:9"


def refusal(target: Path, **options: Any) -> str:
    """The sentence with which an engine's construction ends, before anything loads."""
    speculative = {"method": "ssd", "num_speculative_tokens": 3, **options}
    with pytest.raises(ValueError, match=r"^ssd: ") as caught:
        EngineArgs(
            model=str(target), dtype="float32", max_model_len=256, speculative_config=speculative
        ).create_engine_config()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def at(server: Server) -> dict[str, str]:
    """Where a server is, as options."""
    return {"draft_address": server.address, "draft_key_file": str(server.key_file)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ["'model' is missing", "'draft_address'"]),
        ({"draft_address": ""}, ["'draft_address' = ''"]),
        ({"draft_address": "draft:5000"}, ["'draft_address' = 'draft:5000'", "unix:/", "tcp://"]),
        ({"draft_address": "unix:here"}, ["'draft_address' = 'unix:here'", "must be absolute"]),
        ({"draft_address": "tcp://[::1:5"}, ["'draft_address' = 'tcp://[::1:5'", "IPv6"]),
        ({"draft_address": "tcp://a:99999"}, ["'draft_address'", "at most 65535"]),
        ({"draft_address": TCP}, ["'draft_address'", TCP, "needs a key", "set 'draft_key_file'"]),
        ({"draft_address": "unix:/a", "model": "b"}, ["'model' = 'b'", "leave it out"]),
        (
            {"draft_address": "unix:/a", "draft_dtype": "float32"},
            ["'draft_dtype' = 'float32'", "draft server's own", "leave it out"],
        ),
        (
            {"draft_address": "unix:/a", "draft_cpu_cores": [0]},
            ["'draft_cpu_cores' = [0]", "draft server's own"],
        ),
        ({"model": "b", "draft_key_file": "/k"}, ["'draft_key_file' = '/k'", "'draft_address'"]),
        (
            {"draft_address": TCP, "draft_key_file": "/no/key"},
            ["'draft_key_file'", "/no/key", "make one"],
        ),
    ],
)
def test_an_engine_names_the_option_and_the_mend(
    tiny_pair: TinyModels, options: dict[str, Any], said: list[str]
) -> None:
    sentence = refusal(tiny_pair.target, **options)
    for words in said:
        assert words in sentence


def test_a_key_that_others_can_read_is_refused(tiny_pair: TinyModels, tmp_path: Path) -> None:
    key = new_key(tmp_path)
    key.chmod(0o640)
    sentence = refusal(tiny_pair.target, draft_address=TCP, draft_key_file=str(key))
    assert "option 'draft_key_file'" in sentence
    assert str(key) in sentence
    assert "chmod 600" in sentence


def test_a_server_refuses_another_vocabulary(
    server: Server, tiny_pair: TinyModels, tmp_path: Path
) -> None:
    target = byte_models(tiny_pair, tmp_path).target
    sentence = refusal(target, **at(server))
    assert f"option 'draft_address' = {server.address!r}" in sentence
    assert "the tokenizer of the draft model" in sentence
    assert "choose a draft with the target's tokenizer" in sentence


def test_a_server_refuses_a_larger_k_than_its_own(server: Server, tiny_pair: TinyModels) -> None:
    sentence = refusal(tiny_pair.target, **at(server), num_speculative_tokens=9)
    assert "'num_speculative_tokens' = 9: the draft drafts at most 8" in sentence
    assert "lower it, or start the draft server with --num-speculative-tokens 9" in sentence


def test_a_server_refuses_other_samples_than_its_own(server: Server, tiny_pair: TinyModels) -> None:
    sentence = refusal(tiny_pair.target, **at(server), draft_top_n=10)
    assert "'draft_top_n' = 10: the draft samples from 64" in sentence


# ---- the command


def command_refusal(*arguments: str) -> str:
    """The one line with which the command ends, with status 1."""
    ended = subprocess.run(
        [sys.executable, "-m", "vllm_ssd.cli.main", "draft-server", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vllm-ssd: ")]
    assert "Traceback" not in ended.stderr
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "unix:here"], ["'unix:here'", "must be absolute"]),
        (["--listen", TCP], [f"--listen {TCP}", "needs a key", "draft-key FILE", "--key-file"]),
        (["--listen", TCP, "--key-file", "/no/key"], ["/no/key", "make one"]),
        (["--listen", "unix:/a", "--cores", "a"], ["--cores a", "as 2,3"]),
        (["--listen", "unix:/a", "--cores", "999"], ["--cores", "999 is not available", "use"]),
    ],
)
def test_the_command_says_what_is_wrong(
    tiny_pair: TinyModels, arguments: list[str], said: list[str]
) -> None:
    line = command_refusal("--model", str(tiny_pair.draft), *arguments)
    for words in said:
        assert words in line
    if "999" in line:
        assert str(available_cores()) in line


@pytest.mark.parametrize("no_model", ["/nonexistent/draft", "there/is-none"])
@pytest.mark.slow
def test_the_command_says_that_there_is_no_model(tmp_path: Path, no_model: str) -> None:
    line = command_refusal("--model", no_model, "--listen", f"unix:{tmp_path}/s")
    assert repr(no_model) in line
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_the_command_says_that_the_address_is_in_use(server: Server, tiny_pair: TinyModels) -> None:
    where = ["--listen", server.address, "--key-file", str(server.key_file)]
    line = command_refusal("--model", str(tiny_pair.draft), *where)
    assert server.address.removeprefix("tcp://") in line
    assert "in use" in line
