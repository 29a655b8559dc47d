"""The draft's head, cut down to the rows of some tokens (option ``draft_vocab``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_ssd.hooks import LOGITS_PROCESSOR_ARGUMENTS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig


def select_head_rows(model: nn.Module, config: VllmConfig, token_ids: torch.Tensor) -> None:
    """Let a loaded model compute logits for some tokens only; its embedding stays whole.

    vLLM's models hand their head (the embedding, where the two are tied) to a ``LogitsProcessor``,
    which applies it. The processor gets a smaller head instead, and scales and caps as before. The
    memory of the old head is freed unless it is the embedding.

    Args:
        model: a model without tensor parallelism, its weights processed.
        config: the model's.
        token_ids: ``[N]`` integers on the model's device. From now on the first N columns of what
            ``compute_logits`` returns are theirs, in this order.

    Raises:
        ValueError: the head is quantised, or the logits are not just its product, scaled.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    count, ids = len(token_ids), token_ids.long()
    generator = torch.Generator().manual_seed(0)
    width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
    probe = torch.randn(4, width, generator=generator).to(ids.device, dtype)
    with torch.no_grad(), set_current_vllm_config(config):
        processor, head, bias, logits = _watch_head(model, probe)
        rows = head.weight[ids]
        with torch.device(rows.device):
            small = ParallelLMHead(
                count, width, bias is not None, params_dtype=rows.dtype, disable_tp=True
            )
        small.weight.zero_()[:count] = rows
        if bias is not None:
            small.bias.zero_()[:count] = bias[ids]
        small.quant_method.process_weights_after_loading(small)

        def use_small(_: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
            hidden_states = named["hidden_states"] if len(arguments) < 2 else arguments[1]
            return (small, hidden_states, small.bias), {}

        processor.register_forward_pre_hook(use_small, with_kwargs=True)
        try:
            selected = model.compute_logits(probe)[:, :count].float()
            expected = logits[:, ids].float()
            # Matrix products of other shapes round differently; wrong rows differ by far more.
            same = torch.allclose(selected, expected, rtol=0.02, atol=0.02 * float(expected.std()))
        except (RuntimeError, IndexError):  # something in between needs the vocabulary's size
            same = False
    if not same:
        raise _unselectable("the draft model's logits are not just its head's")
    if isinstance(head, ParallelLMHead):
        head.weight = small.weight
    # On CPU a second copy of the weights, laid out for matrix products.
    vars(head).pop("cpu_linear", None)


def _watch_head(model: nn.Module, probe: torch.Tensor) -> tuple[Any, Any, Any, torch.Tensor]:
    """What computes a model's logits (processor, head, bias), and those of the probe."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    calls: list[tuple[Any, Any, Any]] = []

    def watch(processor: Any, arguments: Sequence[Any], named: dict[str, Any]) -> None:
        given = {**dict(zip(LOGITS_PROCESSOR_ARGUMENTS, arguments, strict=False)), **named}
        head = given["lm_head"]
        method = head.quant_method
        plain = isinstance(method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod))
        if not plain or not head.weight.numel():
            kind = type(method).__name__
            raise _unselectable(f"the draft model's head is quantised or packed ({kind})")
        # vLLM's CPU kernels do not check it.
        if head.weight.shape[-1] != given["hidden_states"].shape[-1]:
            raise _unselectable("the draft model's head has another width than its layers")
        calls.append((processor, head, given.get("embedding_bias")))

    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    hooks = [p.register_forward_pre_hook(watch, with_kwargs=True) for p in processors]
    try:
        logits = model.compute_logits(probe)
    except RuntimeError:  # it does not take hidden states as they are
        calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise _unselectable("the draft model's logits are not just its head's")
    return (*calls[0], logits)


def _unselectable(reason: str) -> ValueError:
    return ValueError(
        f"ssd: option 'draft_vocab': {reason}, so its rows cannot be selected; set it to 0"
    )
