"""The distillation tool, from prompts to a draft that vLLM loads, on a target made in a second."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.distill.toy_target import TOPIC, make_target, write_prompts
from tests.engine.harness import LONG_WAIT_MS, Engine, Job, greedy

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[2] / "examples" / "distill" / "distill.py"
HEAD = 300
PASSES = 6
OPENINGS = ["", "a word of letters " * 6]
"""The second, forty times at once, is more than vLLM computes in a step."""


class Distillation:
    """The tool's command over one folder.

    Args:
        folder: where target, prompts and draft are.
    """

    def __init__(self, folder: Path) -> None:
        self.target, self.out = folder / "target", folder / "draft"
        self._prompts = folder / "prompts.txt"
        self._test_prompts = folder / "unseen.jsonl"
        make_target(self.target)
        write_prompts(self._prompts, 150)
        self._test_prompts.write_text(
            "\n".join(json.dumps({"turns": [f"{letter * 3}?", "and?"]}) for letter in "klmnop")
        )

    def run(self, **options: object) -> subprocess.CompletedProcess[str]:
        """The command with some options changed."""
        chosen: dict[str, object] = {
            "target": self.target,
            "out": self.out,
            "prompts": self._prompts,
            "held_out": self._test_prompts,
            "held_out_topic": TOPIC,
            "self_written": 80,
            "opening": OPENINGS,
            "max_tokens": 40,
            "shape": "narrow:64x1",
            "head": HEAD,
            "batch_tokens": 1024,
            "learning_rate": 5e-3,
            "passes": PASSES,
            "dtype": "float32",
        }
        command = [sys.executable, str(TOOL)]
        for name, value in (chosen | options).items():
            for one in value if isinstance(value, list) else [value]:
                command += [f"--{name.replace('_', '-')}", str(one)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def curve(self) -> list[dict[str, float]]:
        """The points of the training curve."""
        lines = (self.out / "work" / "curve.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def distillation(tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    return Distillation(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def said(distillation: Distillation) -> str:
    """The output of a run from nothing to a draft."""
    done = distillation.run()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_card_gives_the_acceptance_on_texts_held_out_by_topic_and_by_file(
    distillation: Distillation, said: str
) -> None:
    card = (distillation.out / "README.md").read_text()
    rows = re.findall(
        r"^\| ([\w -]+) \| (0\.\d+|1\.0+) \| (\d\.\d+) \| \d+ \|$", card, re.MULTILINE
    )
    found = {name: (float(mean), float(length)) for name, mean, length in rows}
    assert found.keys() == {"others", "all held-out topics", "unseen"}
    for mean, length in found.values():
        assert mean > 0.6
        assert length > 2.0
    assert "prompts.txt" in card
    assert TOPIC in card


def test_the_targets_own_prompts_begin_with_the_openings(
    distillation: Distillation, said: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(distillation.target)
    lines = (distillation.out / "work" / "self-written.jsonl").read_text().splitlines()
    prompts = [tokenizer.decode(json.loads(line)["p"]) for line in lines]
    begun = [f"user: {OPENINGS[1]}" in prompt for prompt in prompts]
    assert any(begun)
    assert not all(begun)


def test_finished_work_is_not_repeated(distillation: Distillation, said: str) -> None:
    before = distillation.curve()
    done = distillation.run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answering" not in done.stderr
    assert "writing prompts" not in done.stderr
    assert distillation.curve() == before


def test_more_passes_go_on_from_the_last_step(distillation: Distillation, said: str) -> None:
    steps = distillation.curve()[-1]["step"]
    done = distillation.run(passes=PASSES + 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed at step {steps:.0f} of" in done.stderr
    assert distillation.curve()[-1]["step"] > steps


@pytest.mark.slow
def test_a_draft_is_trained_further(distillation: Distillation, said: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"  # alone, without the labels that were beside it
    shutil.copy(distillation.out / "work" / "answers-prompts.jsonl", texts)
    further: dict[str, object] = {"answers": texts, "self_written": 0, "prompts": []}
    further |= {"held_out": [], "out": tmp_path, "start_from": distillation.out}
    still: dict[str, object] = {"learning_rate": 0.0, "passes": 0.01}
    done = distillation.run(**further, **still)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "labelling" in done.stderr
    learned = json.loads((tmp_path / "work" / "curve.jsonl").read_text().splitlines()[-1])
    assert learned["acceptance"] > 0.6, "the earlier weights are not those it started from"
    assert f"from the draft `{distillation.out.name}` on" in (tmp_path / "README.md").read_text()
    again = distillation.run(**further, **still)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "labelling" not in again.stderr
    faster = distillation.run(**further, passes=1, learning_rate=1.0)
    assert faster.returncode != 0
    assert "with learning_rate = 0.0, now it is 1.0" in faster.stderr.strip().splitlines()[-1]
    unseen = distillation.run(**further | {"out": tmp_path / "unseen"}, held_out_topic="nowhere")
    assert unseen.returncode != 0
    assert "no text to evaluate with" in unseen.stderr.strip().splitlines()[-1]
    other = distillation.run(**further | {"out": tmp_path / "other"}, shape="layers:0")
    assert other.returncode != 0
    assert f"--start-from {distillation.out}: its intermediate_size is" in other.stderr


def test_texts_of_an_earlier_run_bring_their_labels_and_are_trained_in_bfloat16(
    distillation: Distillation, said: str, tmp_path: Path
) -> None:
    texts = distillation.out / "work" / "answers-prompts.jsonl"
    earlier: dict[str, object] = {"answers": texts, "self_written": 0, "prompts": []}
    done = distillation.run(**earlier, held_out=[], out=tmp_path / "draft", dtype="bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "labelling" not in done.stderr
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "dtype bfloat16" in card
    learned = json.loads((tmp_path / "draft/work/curve.jsonl").read_text().splitlines()[-1])
    assert learned["acceptance"] > 0.6


def test_labels_of_vllm_are_those_of_a_forward_over_the_text(
    distillation: Distillation, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    written = distillation.out / "work" / "self-written.jsonl"
    texts, handed = importlib.import_module("generation").read_made(written)
    assert len(texts) == len(handed) > 0
    computed = importlib.import_module("labels").label(distillation.target, texts, tmp_path)
    for text, ours, theirs in zip(texts, computed, handed, strict=True):
        assert theirs.tokens.shape == (len(text.a), 20)
        assert list(theirs.tokens[:, 0]) == text.a
        np.testing.assert_allclose(theirs.log_probs, ours.log_probs, atol=0.05)


def test_another_shape_in_the_same_folder_is_refused(distillation: Distillation, said: str) -> None:
    done = distillation.run(shape="layers:0")
    assert done.returncode != 0
    assert "was made with shape = 'narrow:64x1'" in done.stderr


def test_impossible_shape_is_refused_in_one_sentence(
    distillation: Distillation, tmp_path: Path
) -> None:
    done = distillation.run(shape="layers:7", out=tmp_path)
    assert done.returncode != 0
    assert "--shape" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_finished_draft_is_quantised_evaluated_and_trained_further(
    distillation: Distillation, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "draft"
    shutil.copytree(distillation.out, folder)
    curve = (folder / "work" / "curve.jsonl").read_text()
    done = distillation.run(out=folder, quantize="int8", passes=PASSES + 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "work" / "curve.jsonl").read_text().startswith(curve), "it began anew"
    after, before = re.findall(r"^\| unseen \| (\S+) \|", (folder / "README.md").read_text(), re.M)
    assert abs(float(after) - float(before)) < 0.05
    types = {weight.dtype for weight in load_file(folder / "model.safetensors").values()}
    assert torch.int8 in types
    _serves(distillation.target, folder)

    still: dict[str, object] = {"learning_rate": 0.0, "passes": 0.01, "prompts": []}
    still |= {"answers": distillation.out / "work" / "answers-prompts.jsonl", "self_written": 0}
    further = distillation.run(**still, held_out=[], start_from=folder, out=tmp_path / "further")
    assert further.returncode == 0, further.stderr[-3000:]
    points = (tmp_path / "further" / "work" / "curve.jsonl").read_text().splitlines()
    assert json.loads(points[-1])["acceptance"] > 0.6


def test_the_draft_serves_in_vllm(distillation: Distillation, said: str) -> None:
    vocabulary = (distillation.out / "draft_vocab.txt").read_text().split("\n")[1:-1]
    assert 0 < len(vocabulary) <= HEAD
    _serves(distillation.target, distillation.out)


def _serves(target: Path, draft: Path) -> None:
    """Check that a draft's tokens are accepted in an engine."""
    speculation = {"method": "ssd", "model": str(draft), "num_speculative_tokens": 4}
    engine = Engine(
        str(target),
        speculative_config={**speculation, "max_wait_ms": LONG_WAIT_MS, "strict": True},
        disable_log_stats=False,
    )
    try:
        question = [{"role": "user", "content": "qqq?"}]
        tokenizer = AutoTokenizer.from_pretrained(draft)
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        engine.run([Job(tokenizer.encode(text, add_special_tokens=False), greedy(60))])
        stats = engine.stats()
    finally:
        engine.close()
    assert stats["tokens_accepted"] > 0.5 * stats["tokens_drafted"] > 0
