"""A draft stored without what it shares with its target comes back whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import TinyModels
from vllm_ssd.cli.shipped import CONFIG, SCALE, TOKENIZER, WEIGHTS, join, version

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
    for name in (*TOKENIZER[:-1], "draft_vocab.txt", "README.md"):
        assert (joined / name).read_bytes() == (draft / name).read_bytes()
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (joined, draft)]
    assert configs[0] == configs[1]


@pytest.fixture
def int8_shipped(tmp_path: Path) -> Path:
    """One layer in int8 with its scales, and a norm."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    layer = torch.tensor([[127, -3], [0, 64]], dtype=torch.int8)
    scale = torch.tensor([[0.5], [2.0]])
    weights = {OWN: layer, f"{OWN}{SCALE}": scale, "model.norm.weight": torch.ones(2).bfloat16()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"hidden_size": 2, "quantization_config": {"a": 1}}))
    return folder


def test_int8_layers_stay_so_or_are_multiplied_out(
    int8_shipped: Path, target: Path, tmp_path: Path
) -> None:
    stored = load_file(int8_shipped / WEIGHTS)
    join(int8_shipped, target, tmp_path / "int8", int8=True)
    same = load_file(tmp_path / "int8" / WEIGHTS)
    assert all(torch.equal(same[name], weight) for name, weight in stored.items())
    assert "quantization_config" in json.loads((tmp_path / "int8" / CONFIG).read_text())

    join(int8_shipped, target, tmp_path / "floats", int8=False)
    floats = load_file(tmp_path / "floats" / WEIGHTS)
    assert floats.keys() == {OWN, "model.norm.weight"}
    assert {weight.dtype for weight in floats.values()} == {torch.bfloat16}
    assert floats[OWN].tolist() == [[63.5, -1.5], [0.0, 128.0]]
    assert json.loads((tmp_path / "floats" / CONFIG).read_text()) == {"hidden_size": 2}


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
