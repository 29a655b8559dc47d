"""What ``vllm-ssd doctor`` finds out about a target and its draft; neither is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vllm_ssd.cli.findings import Finding, Status, checked, refused

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ssd.config import SSDConfig


def examine_pair(target_name: str, draft_name: str) -> Iterator[Finding]:
    """Whether two models are a pair, and what the draft takes.

    Args:
        target_name: folder or hub name.
        draft_name: the same.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.config import SSDConfig
    from vllm_ssd.draft_checks import check_draft
    from vllm_ssd.draft_vocab import select_draft_vocab
    from vllm_ssd.target.draft_config import draft_model_config, first_line
    from vllm_ssd.vocabulary import check_vocabulary

    try:
        target = EngineArgs(model=target_name).create_model_config()
    except Exception as error:  # vLLM, transformers and hub clients each raise their own
        mend = (
            "give the folder or the hub name of a model that this vLLM supports; with options of "
            "its own (--trust-remote-code, --hf-token) only the server itself can tell"
        )
        yield Finding("target", Status.ERROR, f"{target_name}: {first_line(error)}", mend)
        return
    yield Finding("target", Status.OK, f"{target.model}, {target.max_model_len} tokens")
    config = SSDConfig.parse({"model": draft_name, "num_speculative_tokens": 4})
    try:
        draft = draft_model_config(config, target)
    except ValueError as error:
        yield refused("draft", error)
        return
    longest, length = draft.max_model_len, target.max_model_len
    short = longest < length
    yield Finding(
        "draft",
        Status.WARNING if short else Status.OK,
        f"{draft.model}, {longest} tokens" + (f", fewer than the target's {length}" * short),
        "longer texts are decoded plainly; choose another draft, or lower --max-model-len" * short,
    )
    attention = checked("attention", lambda: check_draft(draft), "full: it can be forked")
    yield attention
    if attention.status == Status.ERROR:
        return
    sizes = f"{draft.get_vocab_size()} tokens, the target's {target.get_vocab_size()}"
    yield _vocabulary(sizes, lambda: check_vocabulary(config, target, draft))
    try:
        head = select_draft_vocab(config, target, draft)
    except ValueError as error:
        yield refused("head", error)
        return
    rows = None if head is None else len(head)
    yield Finding("head", Status.OK, "all tokens" if rows is None else f"{rows} tokens")
    yield _draft_memory(config, draft, rows)


def _vocabulary(sizes: str, check: Callable[[], bool]) -> Finding:
    try:
        compared = check()
    except ValueError as error:
        return refused("vocabulary", error)
    if compared:
        return Finding("vocabulary", Status.OK, sizes)
    return Finding(
        "vocabulary",
        Status.WARNING,
        f"{sizes}; the tokenizers could not be read, so they were not compared",
        "see that both models have the same tokenizer",
    )


def _draft_memory(config: SSDConfig, draft: ModelConfig, head_rows: int | None) -> Finding:
    from vllm.platforms import current_platform

    from vllm_ssd.target import memory
    from vllm_ssd.target.checkpoint import checkpoint_tensors

    tensors = checkpoint_tensors(draft.model, config.draft_revision, None)
    weights = memory.weight_bytes(
        tensors,
        memory.shape_of(draft),
        draft.dtype.itemsize,
        head_rows,
        current_platform.is_cpu(),
    )
    kv = memory.draft_kv_bytes_per_token(draft)
    found = f"weights {weights / 2**20:.0f} MiB, KV cache {kv / 2**10:.0f} KiB a token"
    return Finding("memory of the draft", Status.OK, found)
