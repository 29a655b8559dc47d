"""A follower with a draft that is up, and what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.v2.draft_end import DraftEnd, client_of
from tests.v2.messages import look_up_one
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Where
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.follower import Follower
from vllm_ssd.target.v2.outcomes import Row
from vllm_ssd.target.v2.slots import Begun
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.messages import Planted, Start
from vllm_ssd.wire.packing import pack, pack_floats

DEPTH, VOCAB_SIZE, SLOTS, MAX_LENGTH, EOS = 3, 512, 4, 64, 2


class Following:
    """A follower with a draft that is up."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.lengths: dict[int, int] = {}
        """Of each request's text, by serial."""
        self.draft = DraftEnd()
        requests = RequestTable(MAX_LENGTH)
        self.trees = DeviceTrees(SLOTS, DEPTH, VOCAB_SIZE, torch.device("cpu"))
        writer = TreeWriter(self.trees)
        self.client = client_of(self.draft, self.stats, requests.forget_all, writer)
        self.follower = Follower(self.client, writer, requests, self.stats)
        self.client.poll(1.0)
        assert self.client.up

    def begin(self, serial: int, slot: int, prompt: list[int], **params: Any) -> Start:
        """A request begins; how it was announced."""
        self.lengths[serial] = len(prompt)
        self.follower.scheduled([], [Begun(serial, slot, request(prompt, **params))])
        (start,) = self.draft.hears()
        assert isinstance(start, Start)
        return start

    def verify(self, *rows: Row) -> list[Any]:
        """A step ends; what the draft hears of it."""
        told = []
        for each in rows:
            before = self.lengths.get(each.serial, 0)
            length = before + len(each.sampled) if each.length < 0 else each.length
            self.lengths[each.serial] = length
            told.append(each._replace(length=length))
        self.follower.verified(told)
        return self.draft.hears(0.1)

    def plant(self, handle: int, base: int, tokens: list[int]) -> None:
        chances = pack_floats(np.full(len(tokens), 0.5, np.float32))
        numbers = [pack([each]) for each in (handle, base, 5, len(tokens), 0)]
        self.draft.says(
            Planted(
                handles=numbers[0],
                bases=numbers[1],
                trunks=numbers[2],
                counts=numbers[3],
                ended=numbers[4],
                tokens=pack(tokens),
                chances=chances,
            )
        )
        self.client.poll(1.0)

    def found(self, slot: int, text: list[int]) -> list[int]:
        """What the device finds after a text in a slot."""
        found = look_up_one(self.trees, slot, text)
        drafts: list[int] = found.drafts[0, : found.drafted[0]].tolist()
        return drafts


def request(prompt: list[int], tokens: int = 20, text: list[int] | None = None) -> Any:
    """A new request as the scheduler describes it; ``text``: what it had before a preemption."""
    params = SimpleNamespace(
        max_tokens=tokens,
        min_tokens=0,
        temperature=0.0,
        stop_token_ids=[],
        eos_token_id=EOS,
        ignore_eos=False,
    )
    return SimpleNamespace(
        prompt_token_ids=prompt,
        prompt_embeds=None,
        mm_features=[],
        lora_request=None,
        sampling_params=params,
        prompt_len=len(prompt),
        prefill_token_ids=text or prompt,
    )


def row(
    serial: int,
    sampled: list[int],
    proposed: list[int] | None = None,
    length: int = -1,
    ngram: list[int] | None = None,
) -> Row:
    """An outcome; without a length, one that follows the last one."""
    found, text = proposed or [], ngram or []
    where = Where.FOUND if found else Where.OFF
    filled = DEPTH - len(found) - len(text)
    return Row(serial, sampled, length, DEPTH, found, text, 0, filled, False, where)
