"""Which tokens the draft's head is computed for, and which lists of them are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig

from tests.test_errors import configure, refusal
from tests.tiny_models import EOS, HIDDEN, VOCABULARY, TinyModels
from vllm_ssd.config import SSDConfig
from vllm_ssd.draft_vocab import FILE, select_draft_vocab
from vllm_ssd.preflight import check_engine
from vllm_ssd.target.draft_setup import plan_draft
from vllm_ssd.wire.packing import unpack


@pytest.fixture(scope="module")
def target(tiny_pair: TinyModels) -> ModelConfig:
    return ModelConfig(model=str(tiny_pair.target))


@pytest.fixture
def draft(tiny_pair: TinyModels, tmp_path: Path) -> Path:
    """A draft's folder, in which files can be put."""
    return Path(shutil.copytree(tiny_pair.draft, tmp_path / "draft"))


def selected(target: ModelConfig, draft: Path, option: int | str | None = None) -> list[int] | None:
    config = SSDConfig(model=str(draft), num_speculative_tokens=3, draft_vocab=option)
    ids = select_draft_vocab(config, target, ModelConfig(model=str(draft)))
    return None if ids is None else ids.tolist()


def written(file: Path, *lines: object) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_a_draft_without_a_list_has_its_whole_head(target: ModelConfig, draft: Path) -> None:
    assert selected(target, draft) is None
    assert selected(target, draft, 0) is None


def test_a_list_in_the_drafts_folder_is_used_whole_by_default(
    target: ModelConfig, draft: Path
) -> None:
    written(draft / FILE, "# most frequent first", 7, "", 5, EOS, 300)
    assert selected(target, draft) == [7, 5, EOS, 300]
    assert selected(target, draft, 0) is None


def test_a_number_takes_the_first_tokens_of_the_drafts_own_list(
    target: ModelConfig, draft: Path
) -> None:
    written(draft / FILE, 7, 5, 300, 9)
    assert selected(target, draft, 2) == [7, 5, EOS]


def test_a_number_without_a_list_takes_the_lowest_ids(target: ModelConfig, draft: Path) -> None:
    assert selected(target, draft, 4) == [0, 1, 2, 3]
    assert selected(target, draft, 1) == [0, EOS]
    assert selected(target, draft, VOCABULARY) == list(range(VOCABULARY))


def test_a_file_is_taken_whole_whatever_the_folder_lists(
    target: ModelConfig, draft: Path, tmp_path: Path
) -> None:
    written(draft / FILE, 7, 5)
    assert selected(target, draft, str(written(tmp_path / "mine.txt", 8, 9))) == [8, 9, EOS]


def test_every_end_token_of_the_generation_config_is_among_them(
    tiny_pair: TinyModels, draft: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(tiny_pair.target, tmp_path / "target"))
    # An end token that the draft's vocabulary lacks is left out.
    ends = {"eos_token_id": [400, 17, 600]}
    (target / "generation_config.json").write_text(json.dumps(ends))
    assert selected(ModelConfig(model=str(target)), draft, 1) == [0, 400, 17, EOS]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"5\nw7\n", ["line 2 ('w7') is not a token id", "a token id a line"]),
        (b"5\n-7\n", ["line 2 ('-7') is not a token id", "a token id a line"]),
        (b"5 7\n", ["line 1 ('5 7') is not a token id", "a token id a line"]),
        (b"5\n512\n", ["line 2 (512) is beyond the vocabulary", "(512 tokens)", "leave it out"]),
        (b"5\n" + b"9" * 400, ["line 2 (9999", "beyond the vocabulary", "leave it out"]),
        (b"5\n7\n5\n", ["line 3 (5) repeats a token", "list it once"]),
        (b"# nothing\n\n", ["lists no tokens", "a token id a line"]),
        (b"\xff\xfe5\x00", ["not a text file", "give a number"]),
    ],
)
def test_an_unusable_list_is_refused_before_anything_loads(
    tiny_pair: TinyModels, tmp_path: Path, content: bytes, said: list[str]
) -> None:
    file = tmp_path / "tokens.txt"
    file.write_bytes(content)
    sentence = refusal(tiny_pair, draft_vocab=str(file))
    for words in [f"option 'draft_vocab' = '{file}'", *said]:
        assert words in sentence


def test_a_folder_in_place_of_a_list_is_refused(tiny_pair: TinyModels, tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in refusal(tiny_pair, draft_vocab=str(tmp_path))


def test_more_tokens_than_the_drafts_list_has_are_refused(
    tiny_pair: TinyModels, draft: Path
) -> None:
    written(draft / FILE, 7, 5, 300)
    sentence = refusal(tiny_pair, model=str(draft), draft_vocab=4)
    assert f"'draft_vocab' = 4: '{draft / FILE}' lists only 3 tokens; lower it" in sentence


def test_a_bad_list_of_the_drafts_own_is_named(tiny_pair: TinyModels, draft: Path) -> None:
    written(draft / FILE, 7, "x")
    sentence = refusal(tiny_pair, model=str(draft))
    assert f"the draft's own '{draft / FILE}' is used: line 2 ('x')" in sentence


def test_the_list_travels_in_the_setup_and_a_smaller_head_weighs_less(
    tiny_pair: TinyModels,
) -> None:
    def plan(**options: Any) -> Any:
        engine = configure(tiny_pair, **options)
        return plan_draft(check_engine(engine), engine)

    whole, some = plan(), plan(draft_vocab=64)
    assert whole.setup.draft_vocab == b""
    assert unpack(some.setup.draft_vocab).tolist() == list(range(64))
    # On CPU its rows are there twice; and there are fewer logits, in the model's type and float32.
    saved = (VOCABULARY - 64) * (2 * HIDDEN * 4 + whole.rows * (4 + 4))
    assert whole.overhead_bytes - some.overhead_bytes == saved
