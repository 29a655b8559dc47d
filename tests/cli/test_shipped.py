"""A draft stored without what it shares with its target comes back whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import TinyModels
from vllm_ssd.cli.shipped import TOKENIZER, WEIGHTS, join, version

SHIP = Path(__file__).resolve().parents[2] / "examples" / "distill" / "ship.py"
OWN = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def target(tiny_pair: TinyModels, tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    shutil.copytree(tiny_pair.target, folder)
    for name in TOKENIZER:
        (folder / name).touch()
    (folder / TOKENIZER[-1]).unlink(missing_ok=True)  # not every model has all of them
    return folder


@pytest.fixture
def draft(target: Path, tmp_path: Path) -> Path:
    """The target with one weight of its own."""
    folder = tmp_path / "draft"
    shutil.copytree(target, folder)
    weights = load_file(target / WEIGHTS)
    weights[OWN] = weights[OWN] + 1
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "draft_vocab.txt").write_text("5\n")
    (folder / "README.md").write_text("A card.\n")
    return folder


def ship(draft: Path, target: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SHIP), str(draft), str(target), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_only_its_own_weights_are_stored_and_all_come_back(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    shipped, joined = tmp_path / "shipped", tmp_path / "joined"
    done = ship(draft, target, shipped)
    assert done.returncode == 0, done.stderr
    assert load_file(shipped / WEIGHTS).keys() == {OWN}

    join(shipped, target, joined)
    before, after = load_file(draft / WEIGHTS), load_file(joined / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in (*TOKENIZER[:-1], "config.json", "draft_vocab.txt", "README.md"):
        assert (joined / name).read_bytes() == (draft / name).read_bytes()


def test_draft_with_another_tokenizer_is_not_shipped(
    draft: Path, target: Path, tmp_path: Path
) -> None:
    (draft / "tokenizer.json").write_text("{}")
    done = ship(draft, target, tmp_path / "shipped")
    assert done.returncode != 0
    assert "tokenizer.json differs from the target's" in done.stderr
    assert not (tmp_path / "shipped").exists()


@pytest.mark.parametrize("changed", [WEIGHTS, "draft_vocab.txt"])
def test_other_files_have_another_version(tmp_path: Path, changed: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"some")
    (tmp_path / "draft_vocab.txt").write_text("5")
    first = version(tmp_path)
    (tmp_path / changed).write_bytes(b"others")
    assert version(tmp_path) != first
