"""The real draft model in a process of its own, as outside of tests.

vLLM keeps process-wide state (process groups, thread binding, its current configuration), which
must not mix with that of the engines other tests start in this process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.model import BlockChanges, Choices, Sequences

KV_BYTES = 16 << 20


class ModelProcess:
    """A :class:`VllmDraftModel` at the other end of a pipe.

    Args:
        engine_args: as for the model.
        num_candidates: how many best tokens a forward returns.
        vocab_size: only smaller ids are returned.
        draft_vocab: the only ids that are returned; None for all.
        platform_block_size: the block size vLLM's platform is to choose for the attention; None
            for its own choice.
        num_sampled_from: how many best tokens are sampled from.
        as_on_cuda: prepare the inputs with torch, as for CUDA, where a CPU has numpy do it.
    """

    def __init__(
        self,
        engine_args: dict[str, Any],
        num_candidates: int,
        vocab_size: int,
        draft_vocab: Int32Array | None = None,
        platform_block_size: int | None = None,
        num_sampled_from: int = 0,
        as_on_cuda: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        loaded = (vocab_size, draft_vocab), (KV_BYTES, num_candidates, num_sampled_from)
        arguments = (theirs, engine_args, loaded, platform_block_size, as_on_cuda)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.block_size: int = self._receive()

    def forward(self, changes: BlockChanges, sequences: Sequences) -> Choices:
        """Launch a forward and wait for it. Raises what the model raises, and goes on."""
        return self._ask("forward", changes, sequences)

    def compilations(self) -> dict[str, int]:
        """What has been compiled so far, as torch and vLLM count it."""
        return self._ask("compilations")

    def caches_environment(self) -> bool:
        """Whether vLLM reads its environment variables only once."""
        return self._ask("caches_environment")

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(30.0)
        self._process.kill()

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._receive()

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(
    pipe: Connection,
    engine_args: dict[str, Any],
    loaded: tuple[tuple[Any, ...], tuple[Any, ...]],
    platform_block_size: int | None,
    as_on_cuda: bool,
) -> None:
    """The process's entry point: bring the model up, then answer until the pipe closes."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if platform_block_size is not None:
        _choose_block_size(platform_block_size)
    from vllm_ssd.draft.vllm_model import VllmDraftModel

    try:
        model = VllmDraftModel(engine_args)
        model.load(*loaded[0])
        model.compile()
        model.allocate(*loaded[1])
        if as_on_cuda:
            model._host = None
        pipe.send(model.block_size)
        verbs: dict[str, Callable[..., Any]] = {
            "forward": partial(_forward, model),
            "compilations": _compilations,
            "caches_environment": _caches_environment,
        }
        while True:
            verb, *arguments = pipe.recv()
            pipe.send(verbs[verb](*arguments))
    except EOFError:
        os._exit(0)
    except Exception as error:  # the test reports it
        pipe.send(error)
        raise


def _forward(model: Any, changes: BlockChanges, sequences: Sequences) -> Choices | Exception:
    try:
        choices: Choices = model.launch(changes, sequences).result()
        return choices
    except Exception as error:  # the test expects or reports it
        return error


def _choose_block_size(size: int) -> None:
    """Let vLLM's platform choose as it does for an attention that needs this size."""
    from vllm.platforms import current_platform

    def update_block_size_for_backend(vllm_config: Any) -> None:
        vllm_config.cache_config.block_size = size

    current_platform.update_block_size_for_backend = update_block_size_for_backend


def _caches_environment() -> bool:
    from vllm import envs

    return bool(envs._is_envs_cache_enabled())


def _compilations() -> dict[str, int]:
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    compiled = {f"torch {name}": int(count) for name, count in counters["stats"].items()}
    for name, count in vars(compilation_counter).items():
        compiled[f"vllm {name}"] = int(count)
    return compiled
