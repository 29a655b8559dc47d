"""A server whose draft is a draft server at the other end of a network, and what can happen."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from tests.engine.byte_models import byte_models
from tests.robustness import harness
from tests.robustness.scripts import START_SECONDS
from tests.robustness.serving import Server, stats_of
from tests.shared.relay import Relay
from tests.shared.servers import Server as DraftServer
from tests.shared.servers import free_port, new_key
from tests.soak.setup import SPECULATION, Fault, Setup
from tests.tiny_models import TinyModels

CUT_SECONDS = 10.0
FEW_BLOCKS: dict[str, Any] = {"kv-cache-memory-bytes": 1 << 20, "max-model-len": 480}
"""16 blocks of 32 tokens of the draft: two or three requests' texts, without any branch."""
FEW_BLOCKS_SECONDS = 8.0
FREED_SECONDS = 2.0
"""After this time nothing of a target that was killed is left in the draft server."""
REFUSED = "differs from the target's; choose a draft with the target's tokenizer"


class SharedDraft(Setup):
    """The server's worker and the draft server have a core each, if there are two."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self._models, self._folder = models, folder
        self._others = byte_models(models, _made(folder / "bytes"))
        key = new_key(folder)
        self._draft = DraftServer(
            models.near,
            f"tcp://127.0.0.1:{free_port()}",
            folder,
            key,
            {"max-requests": 16, "cores": cores[-1]},
        )
        self._draft.start()
        self._relay = Relay(int(self._draft.address.rpartition(":")[2]))
        where = {"draft_address": self._relay.address, "draft_key_file": str(key)}
        self._speculation = json.dumps({**SPECULATION, **where})
        self._environment = {"VLLM_CPU_OMP_THREADS_BIND": str(cores[0])}
        super().__init__(self._new_server("server"))
        self._second: Server | None = None
        self.faults = {
            "draft server killed": Fault(self._kill),
            f"network cut for {CUT_SECONDS:.0f} s": Fault(self._cut),
            "draft server out of blocks": Fault(self._run_out_of_blocks),
            "draft server back with another model": Fault(self._change_model),
            "another target killed": Fault(self._kill_target, self._start_target),
        }

    def begin(self, prompts: Sequence[list[int]], expected: Sequence[list[int]]) -> None:
        """Wait for both servers, and start the load."""
        self._draft.wait_for("listens on", START_SECONDS)
        super().begin(prompts, expected)

    def end(self) -> None:
        """End all processes."""
        super().end()
        if self._second is not None:
            self._second.end()
        self._relay.close()
        self._draft.end_anyhow()

    def _new_server(self, name: str) -> Server:
        return Server(
            self._models.target,
            _made(self._folder / name),
            self._environment,
            speculative_config=self._speculation,
        )

    def _kill(self) -> str:
        self._draft.kill()
        began = time.monotonic()
        self._draft.start_and_wait()
        return f"there again after {time.monotonic() - began:.1f} s"

    def _cut(self) -> str:
        self._relay.cut()
        time.sleep(CUT_SECONDS)
        assert not stats_of(self.server)["draft_up"], "the cut was not noticed"
        self._relay.heal()
        return "noticed"

    def _run_out_of_blocks(self) -> str:
        def lacking() -> float:
            stats = stats_of(self.server)
            return stats.get("draft_evictions", 0.0) + stats.get("draft_narrowed", 0.0)

        self._draft.kill()
        self._draft.start_and_wait(options=FEW_BLOCKS)
        harness.wait_for(lambda: bool(stats_of(self.server)["draft_up"]), START_SECONDS, "it is up")
        before = lacking()
        time.sleep(FEW_BLOCKS_SECONDS)
        short = lacking() - before
        assert short > 0, "it had blocks enough"
        self._draft.kill()
        self._draft.start_and_wait()
        return f"short of blocks {short:.0f} times"

    def _change_model(self) -> str:
        self._draft.kill()
        self._draft.start_and_wait(self._others.near)
        self._draft.wait_for("a target is refused", START_SECONDS)
        harness.wait_for(lambda: self.server.has_said(REFUSED), 10.0, "the reason in the log")
        assert self._draft.end() == 0
        self._draft.start_and_wait()
        return "refused, with the reason in the log"

    def _start_target(self) -> None:
        """Another server at the same draft, with a load of its own."""
        self._second = second = self._new_server("second")
        harness.wait_for(second.is_healthy, START_SECONDS, "a second server")

        def ask() -> None:
            try:
                while True:
                    second.client.completions.create(
                        model="tiny",
                        prompt=harness.prompts(1)[0],
                        max_tokens=200,
                        temperature=0.0,
                        extra_body={"ignore_eos": True},
                    )
            except openai.APIConnectionError:
                return  # it was killed

        for _ in range(2):
            threading.Thread(target=ask, daemon=True).start()
        harness.wait_for(lambda: stats_of(second)["hits"] > 100, START_SECONDS, "it hits")
        assert self._draft.targets == 2

    def _kill_target(self) -> str:
        assert self._second is not None
        began = time.monotonic()
        self._second.end()
        self._draft.wait_for_targets(1, FREED_SECONDS)
        return f"what it held was free after {time.monotonic() - began:.1f} s"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
