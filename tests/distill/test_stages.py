"""Stages of the distillation tool, cut off and misused."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.distill.toy_target import make_target

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "distill"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the tool by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill") / "target"
    make_target(folder)
    return folder


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("narrow:65x1", "a multiple of 64"),
        ("narrow:128x1", "at most the target's 64"),
        ("layers:0,7", "has layers 0 to 1, not 7"),
        ("wide", "needs layers:<number>,<number>... or narrow:<hidden size>x<layers>"),
    ],
)
def test_impossible_shape_is_explained(tool: Any, target: Path, shape: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        tool("shapes").parse_shape(shape, target)
    assert str(caught.value).startswith(f"--shape {shape}: ")


def test_layers_may_be_counted_from_the_end(tool: Any, target: Path) -> None:
    parse_shape = tool("shapes").parse_shape
    assert parse_shape("layers:0,-1", target).kept == (0, -1)
    with pytest.raises(ValueError, match="not -3"):
        parse_shape("layers:0,-3", target)


def labelled(tool: Any, number: int) -> tuple[Any, Any]:
    """A text that contains its number, with labels that do too."""
    tokens = np.full((3, 20), number, np.int32)
    labels = tool("labels").Labels(tokens, np.zeros((3, 20), np.float16))
    return tool("texts").Text([1, 2], [number] * 3), labels


class CutOffError(Exception):
    """Ends a run early."""


@pytest.mark.parametrize("junk", [b"", b'{"p": [1], "a": [', b"x" * 10_000])
def test_generating_goes_on_where_it_was_cut_off(tool: Any, tmp_path: Path, junk: bytes) -> None:
    generation = tool("generation")
    path, count = tmp_path / "texts.jsonl", 2 * generation.CHUNK + 3

    def until(limit: int) -> Any:
        def some(numbers: range) -> list[tuple[Any, Any]]:
            if numbers.stop > limit:
                raise CutOffError
            return [labelled(tool, number) for number in numbers if number % 5]

        return some

    with pytest.raises(CutOffError):
        generation._in_chunks(count, path, until(generation.CHUNK), "writing")
    with path.open("ab") as file:
        file.write(junk)
    generation._in_chunks(count, path, until(count), "writing")
    generation._in_chunks(count, path, until(0), "nothing is left to write")
    texts, labels = generation.read_made(path)
    assert [text.a[0] for text in texts] == [number for number in range(count) if number % 5]
    assert [int(one.tokens[0, 0]) for one in labels] == [text.a[0] for text in texts]


def test_a_chunk_without_a_text_is_skipped(tool: Any, tmp_path: Path) -> None:
    generation = tool("generation")
    path = tmp_path / "texts.jsonl"
    generation._in_chunks(2 * generation.CHUNK, path, lambda _: [], "writing")
    assert generation.read_made(path) == ([], [])


def test_labelling_goes_on_where_it_was_cut_off(tool: Any, target: Path, tmp_path: Path) -> None:
    labels, text = tool("labels"), tool("texts").Text
    texts = [text([5, 6], [7, 8 + number % 50]) for number in range(labels.SHARD + 2)]
    first = labels.label(target, texts, tmp_path)
    whole, rest = sorted(tmp_path.iterdir())
    before = whole.stat().st_mtime_ns
    rest.unlink()
    again = labels.label(target, texts, tmp_path)
    assert whole.stat().st_mtime_ns == before
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.tokens, other.tokens)


def read(sources: ModuleType, prompts: list[Path], held_out: list[Path]) -> Any:
    return sources.read_sources(Path("target"), [], prompts, held_out, 0, [""], 10, 0)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.train.txt", "a.test.txt"), "are both called 'a': rename one"),
        (("a.txt", "stories.txt"), "the name 'stories' is taken"),
    ],
)
def test_files_with_conflicting_names_are_refused(
    tool: Any, tmp_path: Path, names: tuple[str, str], said: str
) -> None:
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text("Why?\n")
    with pytest.raises(ValueError, match=said):
        read(tool("sources"), paths[:1], paths[1:])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n\n", "there is no prompt in it"),
        ('\n{"prompt": "Why?"}\n{"answer": 1}\n', "line 3: neither 'prompt' nor 'turns' in it"),
        ("[1]\n", "line 1: Expected `object`"),
    ],
)
def test_file_without_prompts_is_refused(
    tool: Any, tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"prompts.jsonl(:|, ).*{said}"):
        read(tool("sources"), [path], [])


# ---- texts made earlier


def made_earlier(tool: Any, folder: Path, numbers: range, target: str = "target") -> Path:
    """A file of texts with their labels beside it, as a run leaves them."""
    generation = tool("generation")
    path = folder / "self-written.jsonl"
    generation._in_chunks(
        len(numbers), path, lambda some: [labelled(tool, numbers[number]) for number in some], "x"
    )
    (folder / "options.json").write_text(json.dumps({"target": f"/elsewhere/{target}"}))
    return path


def read_answers(tool: Any, path: Path) -> Any:
    return tool("sources").read_sources(Path("target"), [path], [], [], 0, [""], 10, 0)


def test_texts_of_an_earlier_run_bring_their_labels(tool: Any, tmp_path: Path) -> None:
    found = read_answers(tool, made_earlier(tool, tmp_path, range(5)))
    assert found.answers == []
    [(texts, labels)] = found.labelled
    assert [int(one.tokens[0, 0]) for one in labels] == [text.a[0] for text in texts] != []


def test_a_folder_of_something_else_beside_the_texts_is_left_alone(
    tool: Any, tmp_path: Path
) -> None:
    path = made_earlier(tool, tmp_path, range(5))
    for shard in (tmp_path / "self-written").iterdir():
        shard.rename(shard.with_name("notes.txt"))
    found = read_answers(tool, path)
    assert len(found.answers) == 5
    assert found.labelled == []


def test_labels_of_other_texts_are_refused(tool: Any, tmp_path: Path) -> None:
    path = made_earlier(tool, tmp_path, range(5))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"of other texts than those of self-written\.jsonl"):
        read_answers(tool, path)


def test_labels_of_another_target_are_refused(tool: Any, tmp_path: Path) -> None:
    path = made_earlier(tool, tmp_path, range(5), target="another")
    with pytest.raises(ValueError, match="its labels are of another, not of target"):
        read_answers(tool, path)
