"""Each wrong input is refused with one sentence: its name and the remedy, before engines load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig, MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.tiny_models import TinyModels
from vllm_ssd import compat
from vllm_ssd.draft_checks import check_draft
from vllm_ssd.plugin import PROPOSER, WORKER
from vllm_ssd.preflight import check_engine
from vllm_ssd.target.draft_setup import plan_draft

DELETED = object()


def configure(models: TinyModels, engine: dict[str, Any] | None = None, **options: Any) -> Any:
    """The beginning of an engine's construction: everything is checked here."""
    speculative = {
        "method": "ssd",
        "model": str(models.draft),
        "num_speculative_tokens": 3,
        **options,
    }
    arguments = {"dtype": "float32", "max_model_len": 256, **(engine or {})}
    return EngineArgs(
        model=str(models.target),
        speculative_config={k: v for k, v in speculative.items() if v is not DELETED},
        **arguments,
    ).create_engine_config()


def refusal(models: TinyModels, engine: dict[str, Any] | None = None, **options: Any) -> str:
    """The sentence with which it is refused."""
    with pytest.raises(ValueError, match=r"^ssd: ") as caught:
        configure(models, engine, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fanout": 3}, ["'fanout'", "did you mean 'fan_out'"]),
        ({"num_speculative_tokens": "3"}, ["'num_speculative_tokens' = '3'", "integer"]),
        ({"num_speculative_tokens": 0}, ["'num_speculative_tokens' = 0", "or equal to 1"]),
        ({"num_speculative_tokens": 33}, ["'num_speculative_tokens' = 33", "or equal to 32"]),
        ({"num_speculative_tokens": DELETED}, ["'num_speculative_tokens' is missing"]),
        ({"model": DELETED}, ["'model' is missing"]),
        ({"model": "/nonexistent/draft"}, ["'/nonexistent/draft'", "no such folder", "hub name"]),
        ({"model": "nobody/nothing"}, ["'nobody/nothing'", "hub name"]),
        ({"fan_out": [1, 2]}, ["'fan_out' = [1, 2]", "= 4 numbers, got 2"]),
        ({"fan_out": -1}, ["'fan_out' = -1", "from 0 to 64"]),
        ({"fan_out": [1, "a", 1, 1]}, ["'fan_out' = [1, 'a', 1, 1]", "integers"]),
        ({"branches": 0}, ["'branches' = 0", "from 1 to 1024, or 'auto'"]),
        ({"max_wait_ms": "5"}, ["'max_wait_ms' = '5'", "milliseconds"]),
        ({"draft_device": "cuda:3"}, ["'draft_device' = 'cuda:3'", "use 'cpu'"]),
        ({"draft_device": "tpu"}, ["'draft_device' = 'tpu'", "'auto', 'cpu'"]),
        ({"draft_cpu_cores": [999]}, ["'draft_cpu_cores' = [999]", "core 999", "use some of"]),
        ({"draft_cpu_cores": []}, ["'draft_cpu_cores' = []", "list of core numbers"]),
        ({"draft_max_model_len": 4096}, ["'draft_max_model_len' = 4096", "at most 1024", "lower"]),
        ({"draft_startup_timeout_s": 1e9}, ["'draft_startup_timeout_s'", "86400"]),
        ({"draft_vocab": -1}, ["'draft_vocab' = -1", "0 for all"]),
        ({"draft_vocab": 513}, ["'draft_vocab' = 513", "has only 512 tokens", "lower it"]),
        ({"draft_vocab": "/no/list"}, ["'draft_vocab' = '/no/list'", "no such file", "a number"]),
        ({"draft_quantization": "zip"}, ["'draft_quantization' = 'zip'", "Must be one of"]),
        (
            {"draft_hf_overrides": {"architectures": ["Nope"]}},
            ["['Nope'] are not supported for now; give the folder"],
        ),
        (
            {"model": "nobody/nothing", "draft_revision": "v9"},
            ["'nobody/nothing'", "that has revision 'v9'"],
        ),
        ({"draft_load_format": "zip"}, ["'draft_load_format' = 'zip'", "not supported", "--load"]),
        ({"acceptance": 0.8}, ["'acceptance' is gone", "leave it out"]),
        ({"fan_out": {"geometric": 99}}, ["'geometric': input should be less than or equal"]),
    ],
)
def test_wrong_option_is_named_with_its_value_and_the_mend(
    tiny_pair: TinyModels, options: dict[str, Any], said: list[str]
) -> None:
    sentence = refusal(tiny_pair, **options)
    for words in said:
        assert words in sentence


def test_a_draft_kv_cache_that_holds_no_whole_text_is_refused(tiny_pair: TinyModels) -> None:
    sentence = refusal(
        tiny_pair,
        {"max_model_len": 1000},
        model=str(tiny_pair.target),
        draft_kv_cache_memory_bytes=1 << 20,
    )
    assert "'draft_kv_cache_memory_bytes' = 1048576 holds 480 tokens" in sentence
    assert "fewer than a text of 1000; raise it to 2162688, or lower draft_max_model" in sentence


def test_a_draft_in_the_home_folder_is_found_by_the_draft_process(
    tiny_pair: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_pair.draft.parent))
    config = configure(tiny_pair, model="~/draft")
    plan = plan_draft(check_engine(config), config)
    assert plan.setup.engine_args["model"] == str(tiny_pair.draft)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size = 2", "tensor_parallel_size"]),
        (
            {"distributed_executor_backend": "external_launcher"},
            ["distributed_executor_backend = 'external_launcher'", "use 'mp'"],
        ),
        ({"data_parallel_size": 2}, ["data_parallel_size = 2", "one server per rank"]),
        ({"prefill_context_parallel_size": 2}, ["prefill_context_parallel_size = 2", "tensor_"]),
        (
            {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
            ["worker_cls = 'vllm.v1.worker.cpu_worker.CPUWorker' is not SSDWorker", WORKER],
        ),
        ({"async_scheduling": True}, ["async_scheduling = True", "leave it unset"]),
    ],
)
def test_engine_argument_that_cannot_work_is_refused(
    tiny_pair: TinyModels, engine: dict[str, Any], said: list[str]
) -> None:
    sentence = refusal(tiny_pair, engine)
    for words in said:
        assert words in sentence


def test_second_model_runner_forced_on_is_refused(
    tiny_pair: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    sentence = refusal(tiny_pair)
    assert "VLLM_USE_V2_MODEL_RUNNER = 1" in sentence
    assert "unset it" in sentence


def test_rays_older_executor_is_refused(
    tiny_pair: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tiny_pair)
    config.parallel_config.distributed_executor_backend = "ray"
    check_engine(config)
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(ValueError, match=r"^ssd: VLLM_USE_RAY_V2_EXECUTOR_BACKEND = 0 .* unset it"):
        check_engine(config)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.1", "1.0.0"])
def test_unsupported_vllm_is_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"^ssd: vLLM .* is not supported; install vLLM 0\.32"):
        compat.check_vllm_version(version)


def test_supported_vllm_is_not_refused() -> None:
    compat.check_vllm_version("0.32.1+cpu")
    compat.check_vllm_version("0.33.0")


# ---- tokenizers


def test_other_tokenizer_of_the_same_size_is_refused(tiny_pair: TinyModels, tmp_path: Path) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)
    _edit(draft / "tokenizer.json", lambda file: _swap(file["model"]["vocab"], "w3", "w4"))
    sentence = refusal(tiny_pair, model=str(draft))
    assert str(draft) in sentence
    assert "'w3' is 4 there and 3 in the target" in sentence
    assert "choose a draft with the target's tokenizer" in sentence


def test_tokenizer_of_other_words_is_refused(tiny_pair: TinyModels, tmp_path: Path) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)

    def rename(file: dict[str, Any]) -> None:
        words = file["model"]["vocab"]
        file["model"]["vocab"] = {
            f"x{i}" if word.startswith("w") else word: i for word, i in words.items()
        }

    _edit(draft / "tokenizer.json", rename)
    sentence = refusal(tiny_pair, model=str(draft))
    assert "shares only" in sentence
    assert "choose a draft with the target's tokenizer" in sentence


def test_padded_vocabulary_of_the_same_tokenizer_is_fine(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)
    _edit(draft / "config.json", lambda file: file.update(vocab_size=576))
    _edit(draft / "tokenizer_config.json", lambda file: file.update(name_or_path="elsewhere"))
    configure(tiny_pair, model=str(draft))


def test_folder_of_weights_alone_needs_the_targets_vocabulary_size(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)
    for file in draft.glob("tokenizer*"):
        file.unlink()
    configure(tiny_pair, model=str(draft))
    _edit(draft / "config.json", lambda file: file.update(vocab_size=500))
    sentence = refusal(tiny_pair, model=str(draft))
    assert "no tokenizer and another vocabulary size (500) than the target (512)" in sentence


# ---- models


def test_draft_with_a_sliding_window_is_refused(tiny_pair: TinyModels, tmp_path: Path) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)
    _edit(draft / "config.json", lambda file: file.update(_mistral(window=64)))
    sentence = refusal(tiny_pair, model=str(draft))
    assert str(draft) in sentence
    assert "sliding window" in sentence
    assert "choose another draft model" in sentence


def test_draft_without_its_window_is_fine(tiny_pair: TinyModels, tmp_path: Path) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)
    _edit(draft / "config.json", lambda file: file.update(_mistral(window=None)))
    configure(tiny_pair, model=str(draft))


def test_draft_with_three_positions_a_token_is_refused(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    draft = _copy(tiny_pair.draft, tmp_path)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    _edit(draft / "config.json", lambda file: file.update(rope_parameters=rope))
    sentence = refusal(tiny_pair, model=str(draft))
    assert "reads more than text (multimodal, M-RoPE)" in sentence
    assert "choose a draft model for text alone" in sentence


def test_multimodal_draft_is_refused(tiny_pair: TinyModels) -> None:
    draft = ModelConfig(model=str(tiny_pair.draft))
    check_draft(draft)
    draft.multimodal_config = MultiModalConfig()
    with pytest.raises(ValueError, match=r"^ssd: option 'model' = .* reads more than text"):
        check_draft(draft)


def test_draft_that_does_not_generate_is_refused(tiny_pair: TinyModels) -> None:
    draft = ModelConfig(model=str(tiny_pair.draft), runner="pooling")
    with pytest.raises(ValueError, match=r"^ssd: option 'model' = .* does not generate text"):
        check_draft(draft)


# ---- vLLM's --spec-... options


def on_command_line(models: TinyModels, *arguments: str) -> Any:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--model", str(models.target), "--dtype", "float32", *arguments]
    return EngineArgs.from_cli_args(parser.parse_args(given)).create_engine_config()


def test_spec_model_and_spec_tokens_complete_the_speculative_config(tiny_pair: TinyModels) -> None:
    options = ["--spec-model", str(tiny_pair.draft), "--spec-tokens", "3"]
    config = on_command_line(tiny_pair, "--speculative-config", '{"method": "ssd"}', *options)
    assert check_engine(config).config.num_speculative_tokens == 3
    draft = check_engine(config).draft
    assert draft is not None
    assert draft.model == str(tiny_pair.draft)
    assert config.parallel_config.worker_cls == WORKER


def test_spec_method_works_where_vllm_lets_it_pass(tiny_pair: TinyModels) -> None:
    arguments = EngineArgs(
        model=str(tiny_pair.target),
        dtype="float32",
        spec_method="ssd",
        spec_model=str(tiny_pair.draft),
        spec_tokens=3,
        speculative_config={"fan-out": 2},
    )
    for _ in range(2):
        assert check_engine(arguments.create_engine_config()).config.fan_out == 2


def test_spec_method_on_the_command_line_is_refused_by_name(
    tiny_pair: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        on_command_line(tiny_pair, "--spec-method", "ssd")
    assert "argument --spec-method" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("spec_tokens", 4, "--spec-tokens = 4, but the speculative config has"),
        ("spec_model", "other", "--spec-model = 'other', but the speculative config has 'model'"),
        ("spec_method", "ngram", "--spec-method = 'ngram', but the speculative config has"),
    ],
)
def test_an_option_given_twice_is_refused(
    tiny_pair: TinyModels, flag: str, value: Any, said: str
) -> None:
    sentence = refusal(tiny_pair, {flag: value})
    assert said in sentence
    assert "leave one of them out" in sentence


def test_automatic_model_length_on_the_command_line_is_fine(tiny_pair: TinyModels) -> None:
    options = json.dumps(
        {"method": "ssd", "model": str(tiny_pair.draft), "num_speculative_tokens": 3}
    )
    config = on_command_line(tiny_pair, "--max-model-len", "auto", "--speculative-config", options)
    assert plan_draft(check_engine(config), config).fits_length


# ---- vLLM's plain spelling


def plain(models: TinyModels, additional: dict[str, Any], tokens: int = 3) -> Any:
    return EngineArgs(
        model=str(models.target),
        dtype="float32",
        max_model_len=256,
        worker_cls=WORKER,
        additional_config=additional,
        speculative_config={
            "method": "custom_class",
            "model": PROPOSER,
            "num_speculative_tokens": tokens,
        },
    ).create_engine_config()


def test_plain_spelling_is_equivalent_to_the_method(tiny_pair: TinyModels) -> None:
    options = {"model": str(tiny_pair.draft), "num_speculative_tokens": 3, "fan_out": 2}
    ours = configure(tiny_pair, fan_out=2)
    theirs = plain(tiny_pair, {"ssd": options})
    assert theirs.additional_config == ours.additional_config
    assert theirs.parallel_config.worker_cls == ours.parallel_config.worker_cls == WORKER
    assert check_engine(theirs) == check_engine(ours)


def test_plain_spelling_without_options_is_refused(tiny_pair: TinyModels) -> None:
    with pytest.raises(ValueError, match=r"^ssd: .*--additional-config.*\{\"ssd\": "):
        check_engine(plain(tiny_pair, {}))


def test_plain_spelling_with_two_depths_is_refused(tiny_pair: TinyModels) -> None:
    options = {"model": str(tiny_pair.draft), "num_speculative_tokens": 4}
    with pytest.raises(ValueError, match=r"'num_speculative_tokens' = 4 differs .* 3; set both"):
        check_engine(plain(tiny_pair, {"ssd": options}))


def test_plain_spelling_is_checked_like_the_method(tiny_pair: TinyModels) -> None:
    options = {"model": str(tiny_pair.draft), "num_speculative_tokens": 3, "branches": 0}
    with pytest.raises(ValueError, match=r"^ssd: option 'branches' = 0"):
        check_engine(plain(tiny_pair, {"ssd": options}))


def _copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "draft"))


def _edit(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _swap(words: dict[str, int], one: str, other: str) -> None:
    words[one], words[other] = words[other], words[one]


def _mistral(window: int | None) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
    }


# ---- int8 layers on a CPU with AMX, which vLLM computes in 16 bits only


@pytest.mark.parametrize(("amx", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_draft_in_int8_is_in_bfloat16_where_vllm_has_no_float32_for_it(
    tiny_pair: TinyModels,
    int8_draft: Path,
    monkeypatch: pytest.MonkeyPatch,
    amx: bool,
    dtype: str,
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    draft = check_engine(configure(tiny_pair, model=str(int8_draft))).draft
    assert draft is not None
    assert str(draft.dtype) == f"torch.{dtype}"


def test_float32_for_a_draft_in_int8_is_refused_there(
    tiny_pair: TinyModels, int8_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    sentence = refusal(tiny_pair, model=str(int8_draft), draft_dtype="float32")
    assert all(part in sentence for part in ("'draft_dtype' = 'float32'", "int8", "'bfloat16'"))
    assert check_engine(configure(tiny_pair, model=str(int8_draft), draft_dtype="bfloat16"))
