"""Texts the target writes itself: prompts in the user's place, and greedy answers to prompts.

Each file of texts has a folder of labels beside it, of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from labels import BEST, Labels, read_labels, save_labels
from progress import say, track
from texts import Text, read_texts
from transformers import AutoConfig

CHUNK = 256
"""Prompts between two writes: the most that is lost when generating is cut off."""
PROMPT_TOKENS = 200
CONTEXT = 2048
MAX_ANSWER = 1024
"""Most tokens of an answer, so that prompts fit beside it."""


class Target:
    """The target as vLLM runs it, many sequences at once.

    Args:
        folder: the model.
        dtype: as vLLM's.
        sequences: how many are generated at once.
    """

    def __init__(self, folder: Path, dtype: str, sequences: int = 128) -> None:
        from vllm import LLM

        config = AutoConfig.from_pretrained(folder)
        self._context = min(CONTEXT, config.max_position_embeddings)
        self._llm = LLM(
            model=str(folder),
            dtype=dtype,
            max_model_len=self._context,
            max_num_seqs=sequences,
            max_num_batched_tokens=CONTEXT,
            # A seeded request whose prompt is chunked stops vLLM's CPU engine.
            enable_chunked_prefill=False,
            kv_cache_memory_bytes=2 << 30,
            enforce_eager=True,
            max_logprobs=BEST,
            disable_log_stats=True,
        )
        self._tokenizer: Any = self._llm.get_tokenizer()

    def close(self) -> None:
        """End the engine: training needs its memory and cores."""
        self._llm.llm_engine.engine_core.shutdown()

    def chat(self, message: str) -> list[int]:
        """A user's message in the chat template, as token ids."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        return self._tokenizer.encode(text, add_special_tokens=False)

    def write_prompts(self, numbers: range, seed: int, openings: list[str]) -> list[str]:
        """Messages the target writes when its chat template is opened at the user's turn.

        Args:
            numbers: one prompt is sampled for each, with ``seed + number``.
            seed: of the whole run.
            openings: how the messages begin, in turn; an empty one leaves that to the target.
        """
        from vllm import SamplingParams

        mark = "\x00"
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], add_generation_prompt=False, tokenize=False
        )
        turn = text.split(mark)[0]
        begun = [openings[number % len(openings)] for number in numbers]
        prompts = [
            {"prompt_token_ids": self._tokenizer.encode(turn + words, add_special_tokens=False)}
            for words in begun
        ]
        parameters = [
            SamplingParams(temperature=1.0, seed=seed + number, max_tokens=PROMPT_TOKENS)
            for number in numbers
        ]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        ended = [output.outputs[0] for output in outputs]
        # One that was cut off is not a whole message.
        return [
            (words + said.text).strip()
            for words, said in zip(begun, ended, strict=True)
            if said.finish_reason == "stop" and said.text
        ]

    def answer(self, prompts: list[list[int]], max_tokens: int) -> list[tuple[Text, Labels]]:
        """Greedy answers with the target's distribution at each of their tokens."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=BEST,
            flat_logprobs=True,
            detokenize=False,
        )
        fitting = [prompt for prompt in prompts if len(prompt) + max_tokens <= self._context]
        if left_out := len(prompts) - len(fitting):
            say(f"{left_out} prompts do not fit into {self._context} tokens with their answers")
        if not fitting:
            return []
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in fitting], parameters, use_tqdm=False
        )
        ended = [output.outputs[0] for output in outputs]
        return [
            (Text(prompt, list(said.token_ids)), _labels(said.logprobs))
            for prompt, said in zip(fitting, ended, strict=True)
        ]


def _labels(flat: Any) -> Labels:
    """vLLM's flat log probabilities: at each token the chosen one, then the likeliest."""
    shape = (-1, 1 + BEST)
    return Labels(
        np.array(flat.token_ids, np.int32).reshape(shape)[:, 1:],
        np.array(flat.logprobs, np.float16).reshape(shape)[:, 1:],
    )


def labels_of(path: Path) -> Path:
    """The folder beside a file of texts where their labels are."""
    return path.parent / path.name.removesuffix(".gz").removesuffix(".jsonl")


def has_labels(path: Path) -> bool:
    """Whether a file of texts has labels beside it."""
    return any(labels_of(path).glob("labels-*.npz"))


def read_made(path: Path) -> tuple[list[Text], list[Labels]]:
    """The texts of a file that was written here, and their labels.

    Raises:
        ValueError: the labels are those of other texts.
    """
    texts, labels = read_texts(path), read_labels(labels_of(path))
    if [len(text.a) for text in texts] != [len(some.tokens) for some in labels]:
        raise ValueError(
            f"{labels_of(path)}: these labels are of other texts than those of {path.name}: "
            "move them away, and others are computed"
        )
    return texts, labels


def answer_prompts(
    prompts: list[str], path: Path, target: Callable[[], Target], max_tokens: int
) -> None:
    """Append answers to prompts to a file, going on where an earlier run stopped."""

    def some(numbers: range) -> list[tuple[Text, Labels]]:
        model = target()
        return model.answer([model.chat(prompts[number]) for number in numbers], max_tokens)

    _in_chunks(len(prompts), path, some, f"answering {path.stem}")


def write_texts(
    count: int,
    seed: int,
    openings: list[str],
    path: Path,
    target: Callable[[], Target],
    max_tokens: int,
) -> None:
    """Append answers to ``count`` prompts of the target's own, going on in the same way."""

    def some(numbers: range) -> list[tuple[Text, Labels]]:
        model = target()
        prompts = dict.fromkeys(model.write_prompts(numbers, seed, openings))
        return model.answer([model.chat(prompt) for prompt in prompts], max_tokens)

    _in_chunks(count, path, some, "writing prompts and answers")


def _in_chunks(
    count: int, path: Path, some: Callable[[range], list[tuple[Text, Labels]]], what: str
) -> None:
    state = path.with_suffix(".state")
    done, size = json.loads(state.read_text()) if state.exists() else (0, 0)
    for start in track(range(done, count, CHUNK), what):
        made = some(range(start, min(start + CHUNK, count)))
        if made:
            save_labels(labels_of(path), start, [labels for _, labels in made])
        with path.open("ab") as file:
            # What follows was written by a run that was cut off before it recorded it.
            file.truncate(size)
            file.write(b"".join(msgspec.json.encode(text) + b"\n" for text, _ in made))
            file.flush()  # or the position would be counted from the old end
            size = file.tell()
        scratch = state.with_suffix(".partial")
        scratch.write_text(json.dumps([min(start + CHUNK, count), size]))
        scratch.rename(state)
