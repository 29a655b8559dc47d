"""The real draft model against transformers, on the same texts through forked block tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.draft.model_process import ModelProcess
from tests.tiny_models import VOCABULARY, TinyModels
from vllm_ssd.core.arrays import Float32Array, Float64Array, Int32Array
from vllm_ssd.draft.model import BlockChanges, Choices, Sampling, Sequences

CANDIDATES = 6
VOCAB_SIZE = VOCABULARY - 12  # a target with a smaller vocabulary
SAMPLED_FROM = 10
MAX_ROWS = 24
BLOCK_SIZE = 32
TOLERANCE = 1e-4
"""Of logits in float32; two candidates closer than this may change places."""


def engine_args(tiny: TinyModels, enforce_eager: bool) -> dict[str, Any]:
    return {
        "model": str(tiny.draft),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": MAX_ROWS,
        "max_num_batched_tokens": MAX_ROWS + 64,
        "enforce_eager": enforce_eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
        "block_size": BLOCK_SIZE,
    }


@dataclass
class Branch:
    """A text and the blocks its KV is in."""

    row: int
    blocks: list[int]
    text: list[int] = field(default_factory=list)


class Forest:
    """Branches over one model, and transformers' model to compare with."""

    def __init__(self, model: ModelProcess, reference: Any) -> None:
        assert model.block_size == BLOCK_SIZE
        self._model = model
        self._reference = reference
        self._next_block = 1
        self._next_row = 0
        self._copies: list[tuple[int, int]] = []
        self._changed: list[Branch] = []

    def plant(self) -> Branch:
        """An empty branch with two blocks."""
        return self._branch(self._new_blocks(2), [])

    def fork(self, parent: Branch) -> Branch:
        """A branch that shares the full blocks and copies the partial one, as the engine forks."""
        full = len(parent.text) // BLOCK_SIZE
        own = self._new_blocks(len(parent.blocks) - full)
        if len(parent.text) % BLOCK_SIZE:
            self._copies.append((parent.blocks[full], own[0]))
        return self._branch(parent.blocks[:full] + own, list(parent.text))

    def grow(self, branch: Branch) -> None:
        """One more block for a branch; its table changes."""
        branch.blocks += self._new_blocks(1)
        self._changed.append(branch)

    def move(self, branch: Branch) -> None:
        """Another row for a branch, as when a fork becomes the trunk."""
        self._next_row += 1
        branch.row = self._next_row % MAX_ROWS
        self._changed.append(branch)

    def _branch(self, blocks: list[int], text: list[int]) -> Branch:
        branch = Branch(0, blocks, text)
        self.move(branch)
        return branch

    def _new_blocks(self, count: int) -> list[int]:
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def changes(self) -> BlockChanges:
        """What has happened since the forward before."""
        copies, self._copies = self._copies, []
        changed = {branch.row: branch for branch in self._changed}
        self._changed = []
        tables = np.zeros((len(changed), max([0, *_lengths(changed.values())])), np.int32)
        for table, branch in zip(tables, changed.values(), strict=True):
            table[: len(branch.blocks)] = branch.blocks
        return BlockChanges.of_tables(np.array(list(changed), np.int32), tables)._replace(
            sources=np.array([source for source, _ in copies], np.int32),
            destinations=np.array([destination for _, destination in copies], np.int32),
        )

    def feed(self, *parts: tuple[Branch, Sequence[int]]) -> Int32Array:
        """One forward that lets each branch grow; checked against transformers."""
        parts = tuple(sorted(parts, key=lambda part: len(part[1]) > 1))
        positions = [len(branch.text) + i for branch, tokens in parts for i in range(len(tokens))]
        top, probabilities, _, _ = self._model.forward(
            self.changes(),
            Sequences(
                np.array([branch.row for branch, _ in parts], np.int32),
                np.array([len(tokens) for _, tokens in parts], np.int32),
                np.array([token for _, tokens in parts for token in tokens], np.int32),
                np.array(positions, np.int32),
            ),
        )
        assert top.shape == probabilities.shape == (len(parts), CANDIDATES)
        for (branch, tokens), best, shares in zip(parts, top, probabilities, strict=True):
            branch.text += tokens
            self._check(branch.text, best, shares)
        return top

    def sample(self, branches: Sequence[Branch], sampling: Sampling) -> Choices:
        """One forward that lets each branch grow by token 5 and samples what follows."""
        choices = self._model.forward(
            self.changes(),
            Sequences(
                np.array([branch.row for branch in branches], np.int32),
                np.ones(len(branches), np.int32),
                np.full(len(branches), 5, np.int32),
                np.array([len(branch.text) for branch in branches], np.int32),
                sampling,
            ),
        )
        for branch, best, shares in zip(
            branches, choices.tokens, choices.probabilities, strict=True
        ):
            branch.text.append(5)
            if not sampling.temperature[0]:
                self._check(branch.text, best[:CANDIDATES], shares)
        return choices

    def logits(self, text: list[int]) -> Float64Array:
        """Of all tokens that the target knows, as transformers computes them."""
        import torch

        with torch.inference_mode():
            found: Float64Array = (
                self._reference(torch.tensor([text])).logits[0, -1, :VOCAB_SIZE].double().numpy()
            )
        return found

    def _check(self, text: list[int], best: Int32Array, shares: Float32Array) -> None:
        import torch

        with torch.inference_mode():
            logits = self._reference(torch.tensor([text])).logits[0, -1, :VOCAB_SIZE]
        expected = torch.topk(logits, CANDIDATES).values
        torch.testing.assert_close(logits[best.tolist()], expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert len(set(best.tolist())) == CANDIDATES
        torch.testing.assert_close(
            torch.from_numpy(shares), expected.softmax(-1), atol=TOLERANCE, rtol=TOLERANCE
        )


def _lengths(branches: Iterable[Branch]) -> list[int]:
    return [len(branch.blocks) for branch in branches]


@pytest.fixture(scope="module")
def reference(tiny_pair: TinyModels) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_pair.draft, dtype=torch.float32).eval()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="compiled", marks=pytest.mark.slow),
        pytest.param(True, id="eager, inputs as on CUDA"),
    ],
)
def model(request: pytest.FixtureRequest, tiny_pair: TinyModels) -> Iterator[ModelProcess]:
    eager: bool = request.param
    arguments = engine_args(tiny_pair, eager)
    sizes = CANDIDATES, VOCAB_SIZE
    with ModelProcess(
        arguments, *sizes, num_sampled_from=SAMPLED_FROM, as_on_cuda=eager
    ) as process:
        yield process


@pytest.fixture
def forest(model: ModelProcess, reference: Any) -> Forest:
    return Forest(model, reference)


def text(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()
    return tokens


def test_a_prompt_in_chunks_gives_what_transformers_gives(forest: Forest) -> None:
    branch, prompt = forest.plant(), text(50)
    for start, end in [(0, 1), (1, 8), (8, 31), (31, 32), (32, 50)]:
        forest.feed((branch, prompt[start:end]))


def test_a_branch_decodes_across_a_block_boundary(forest: Forest) -> None:
    branch = forest.plant()
    top = forest.feed((branch, text(30)))
    for _ in range(4):
        top = forest.feed((branch, top[0, :1].tolist()))


def test_forks_go_on_from_a_copied_block_and_do_not_disturb_each_other(forest: Forest) -> None:
    trunk = forest.plant()
    top = forest.feed((trunk, text(40)))[0].tolist()
    forks = [forest.fork(trunk) for _ in range(3)]
    # The trunk goes on too, into the very slots its forks have copies of.
    branches = [trunk, *forks]
    next_tokens = top[:4]
    for _ in range(4):
        best = forest.feed(*zip(branches, [[token] for token in next_tokens], strict=True))
        next_tokens = best[:, 0].tolist()
    assert len({tuple(branch.text) for branch in branches}) == 4


def test_a_fork_at_a_block_boundary_needs_no_copy(forest: Forest) -> None:
    trunk = forest.plant()
    forest.feed((trunk, text(BLOCK_SIZE)))
    fork = forest.fork(trunk)
    assert fork.blocks[0] == trunk.blocks[0]
    assert fork.blocks[1] != trunk.blocks[1]
    forest.feed((trunk, [7]), (fork, [8]))
    forest.feed((trunk, [9]), (fork, [9]))


def test_a_chunk_beside_decoding_branches_changes_neither(forest: Forest) -> None:
    trunk, prompt = forest.plant(), forest.plant()
    forest.feed((trunk, text(33)))
    fork = forest.fork(trunk)
    chunks = text(45, seed=1)
    forest.feed((trunk, [5]), (fork, [6]), (prompt, chunks[:20]))
    forest.feed((trunk, [6]), (fork, [7]), (prompt, chunks[20:21]))
    forest.feed((trunk, [7]), (fork, [8]), (prompt, chunks[21:]))


def test_as_many_branches_as_there_are_rows_are_one_batch(forest: Forest) -> None:
    trunk = forest.plant()
    forest.feed((trunk, text(35)))
    branches = [forest.fork(trunk) for _ in range(MAX_ROWS)]
    forest.feed(*[(branch, [3 + i]) for i, branch in enumerate(branches)])


def test_a_table_that_grows_is_sent_alone(forest: Forest) -> None:
    """The other rows keep their tables of earlier forwards."""
    one, other = forest.plant(), forest.plant()
    forest.feed((one, text(60)))
    forest.feed((other, text(61, seed=1)))
    top = forest.feed((one, [3]), (other, [4]))
    for _ in range(6):
        for branch in (one, other):
            if len(branch.text) == len(branch.blocks) * BLOCK_SIZE:
                forest.grow(branch)
        top = forest.feed((one, top[0, :1].tolist()), (other, top[1, :1].tolist()))


def test_a_branch_goes_on_in_another_row(forest: Forest) -> None:
    trunk = forest.plant()
    forest.feed((trunk, text(40)))
    fork = forest.fork(trunk)
    forest.feed((trunk, [5]), (fork, [6]))
    trunk.row, fork.row = fork.row, trunk.row
    forest.move(trunk)
    forest.move(fork)
    forest.feed((fork, [7]), (trunk, [8]))


def test_the_order_of_a_batch_does_not_matter(forest: Forest) -> None:
    branches = [forest.plant() for _ in range(5)]
    for seed, branch in enumerate(branches):
        forest.feed((branch, text(20 + seed, seed)))
    forest.feed(*[(branch, [3]) for branch in reversed(branches)])
    forest.feed(*[(branches[i], [4]) for i in (2, 0, 4)])


def test_after_an_error_the_model_goes_on(model: ModelProcess, forest: Forest) -> None:
    branch = forest.plant()
    forest.feed((branch, text(35)))
    fork = forest.fork(branch)
    changes = forest.changes()
    token, position = np.array([3], np.int32), np.array([35], np.int32)
    beyond = Sequences(np.array([MAX_ROWS + 5], np.int32), np.ones(1, np.int32), token, position)
    with pytest.raises(IndexError):
        model.forward(changes, beyond)
    forest.feed((branch, [4]), (fork, [5]))


def test_ids_beyond_the_targets_vocabulary_are_never_drafted(forest: Forest) -> None:
    branch = forest.plant()
    for token in text(40, seed=2):
        assert forest.feed((branch, [token])).max() < VOCAB_SIZE


def test_tokens_are_sampled_at_each_requests_temperature(forest: Forest) -> None:
    branches = [forest.plant() for _ in range(4)]
    for seed, branch in enumerate(branches):
        forest.feed((branch, text(20, seed)))
    end = int(np.argsort(forest.logits([*branches[2].text, 5]))[-2])
    sampling = Sampling(
        np.array([True, True, True, False]),
        np.array([0.5, 1.5, 1.0, 0.0], np.float32),
        np.array([0, 0, 4, 0], np.int32),
        np.ones(4, np.float32),
        np.array([[-1], [-1], [end], [-1]], np.int32),
        np.zeros(4, np.int32),
        np.ones(4, np.float32),
    )
    choices = forest.sample(branches, sampling)
    assert choices.tokens.shape == (4, SAMPLED_FROM)
    assert choices.probabilities.shape == (4, CANDIDATES)
    assert choices.proposals is not None
    assert choices.proposals.dtype == np.float32
    for i, branch in enumerate(branches):
        best, q = choices.tokens[i], choices.proposals[i]
        heat = forest.logits(branch.text)[best] / (float(sampling.temperature[i]) or 1.0)
        heat -= heat.max()
        if sampling.top_k[i]:
            heat[sampling.top_k[i] :] = -np.inf
        stated = np.exp(heat[:CANDIDATES])
        np.testing.assert_allclose(choices.probabilities[i], stated / stated.sum(), atol=1e-3)
        expected = np.exp(heat)
        expected[best == (end if i == 2 else -1)] = 0.0
        if not sampling.sampled[i]:
            expected[1:] = 0.0
        np.testing.assert_allclose(q, expected / expected.sum(), atol=1e-3)
        assert q[best == choices.next_tokens[i]].item() > 0.0


def test_without_samples_no_more_tokens_are_chosen_than_otherwise(forest: Forest) -> None:
    branch = forest.plant()
    forest.feed((branch, text(20)))
    greedy = Sampling(
        np.zeros(1, np.bool_),
        np.zeros(1, np.float32),
        np.zeros(1, np.int32),
        np.ones(1, np.float32),
        np.full((1, 1), -1, np.int32),
        np.zeros(1, np.int32),
        np.ones(1, np.float32),
    )
    choices = forest.sample([branch], greedy)
    assert choices.tokens.shape == (1, CANDIDATES)
    assert choices.proposals is None
    assert choices.next_tokens.tolist() == choices.tokens[:, 0].tolist()


def test_nothing_is_compiled_again_as_the_rows_change(model: ModelProcess, forest: Forest) -> None:
    trunk = forest.plant()
    forest.feed((trunk, text(35)))
    compiled = model.compilations()
    for count in (1, 2, 3, 8, 17, MAX_ROWS, 5, 1):
        branches = [forest.fork(trunk) for _ in range(count)]
        forest.feed(*[(branch, [3 + i]) for i, branch in enumerate(branches)])
    forest.feed((trunk, [4]), (forest.plant(), text(20)))
    assert model.compilations() == compiled


def test_the_model_is_compiled_by_default(
    model: ModelProcess, request: pytest.FixtureRequest
) -> None:
    if "eager" in request.node.name:
        pytest.skip("told not to")
    ways = ("graphs_seen", "aot_compiles", "aot_artifacts_loaded")
    assert any(model.compilations()[f"vllm num_{way}"] for way in ways)


@pytest.mark.slow
def test_the_block_size_is_the_one_that_vllm_chooses_for_the_attention(
    tiny_pair: TinyModels,
) -> None:
    arguments = engine_args(tiny_pair, enforce_eager=True)
    del arguments["block_size"]
    with ModelProcess(arguments, CANDIDATES, VOCAB_SIZE, platform_block_size=64) as process:
        assert process.block_size == 64


def test_vllm_reads_its_environment_once(model: ModelProcess) -> None:
    assert model.caches_environment()
