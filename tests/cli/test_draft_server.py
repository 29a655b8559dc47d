"""How a draft server brings its model up, by its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import EOS, VOCABULARY, TinyModels
from vllm_ssd.cli.draft_server import Options, plan
from vllm_ssd.config import SSDConfig
from vllm_ssd.wire.messages import Setup
from vllm_ssd.wire.packing import unpack


def planned(models: TinyModels, vocab_size: int | None = None, **draft: Any) -> Setup:
    draft = {
        "model": str(models.draft),
        "num_speculative_tokens": 4,
        "branches": 8,
        "draft_kv_cache_memory_bytes": 64 << 20,
        **draft,
    }
    options = Options(
        listen="unix:/nowhere",
        key_file=None,
        metrics_port=None,
        metrics_host="",
        max_targets=4,
        max_requests=16,
        vocab_size=vocab_size,
        trust_remote_code=False,
        draft=draft,
    )
    setup, size = plan(SSDConfig.parse(draft), options)
    assert size == 64 << 20
    return setup


def test_by_default_all_tokens_are_drafted(tiny_pair: TinyModels) -> None:
    setup = planned(tiny_pair)
    assert setup.vocab_size == VOCABULARY
    assert setup.draft_vocab == b""
    assert setup.enable_prefix_caching
    assert setup.engine_args["max_num_seqs"] == 16 * 8


def test_a_smaller_vocabulary_cuts_the_heads_tokens(tiny_pair: TinyModels, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("7\n300\n5\n299\n511\n")
    setup = planned(tiny_pair, vocab_size=300, draft_vocab=str(file))
    assert setup.vocab_size == 300
    # Their order stays, and the end token is among them.
    assert unpack(setup.draft_vocab).tolist() == [7, 5, 299, EOS]


def test_no_vocabulary_is_larger_than_the_drafts(tiny_pair: TinyModels) -> None:
    assert planned(tiny_pair, vocab_size=VOCABULARY + 1).vocab_size == VOCABULARY


def test_a_vocabulary_that_leaves_the_head_no_token_is_refused(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("300\n")
    with pytest.raises(ValueError, match="no token below --vocab-size 2; raise that"):
        planned(tiny_pair, vocab_size=2, draft_vocab=str(file))
