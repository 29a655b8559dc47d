"""What ``vllm-ssd doctor`` finds out about a draft server; it does not join it."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_ssd.cli.findings import Finding, Status, refused


def examine_server(address: str, key_file: str | None, target: str | None) -> Iterator[Finding]:
    """Whether it can be reached, and drafts for a target.

    Args:
        address: the option ``draft_address``.
        key_file: the option ``draft_key_file``.
        target: folder or hub name of the target; None for none.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.config import SSDConfig
    from vllm_ssd.target.draft_config import first_line
    from vllm_ssd.target.links.attachment import CONNECT_SECONDS, ask, server_of
    from vllm_ssd.target.links.joining import join_of
    from vllm_ssd.vocabulary import tokenizer_hash
    from vllm_ssd.wire.network import connect

    options = {"draft_address": address, "num_speculative_tokens": 4}
    try:
        config = SSDConfig.parse(options | ({"draft_key_file": key_file} if key_file else {}))
        parsed, key = server_of(config)
        if target is None:
            connect(parsed, key, CONNECT_SECONDS).close()
            yield Finding("draft server", Status.OK, f"{parsed}: it can be reached")
            return
        model = EngineArgs(model=target).create_model_config()
        tokenizer = tokenizer_hash(model.tokenizer, model.tokenizer_revision)
        ask(parsed, key, join_of(config, model.get_vocab_size(), tokenizer))
    except (ValueError, RuntimeError) as error:
        yield refused("draft server", error)
    except OSError as error:
        mend = "start it (vllm-ssd draft-server), or see that the address and the key are its own"
        yield Finding("draft server", Status.ERROR, str(error), mend)
    except Exception as error:  # of vLLM, transformers, the hub
        yield Finding("target", Status.ERROR, f"{target}: {first_line(error)}")
    else:
        yield Finding("draft server", Status.OK, f"{parsed}: it drafts for {model.model}")
