"""``vllm-ssd draft-server``: a draft model that any number of targets share."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_ssd.affinity import available_cores
from vllm_ssd.cli import CommandError
from vllm_ssd.cli.env import run_python, with_openmp
from vllm_ssd.config import SSDConfig
from vllm_ssd.target.links.process import draft_environment
from vllm_ssd.target.placement import device_index
from vllm_ssd.wire.address import Address, TCPAddress, parse_address
from vllm_ssd.wire.keys import Key, read_key

if TYPE_CHECKING:
    from vllm_ssd.wire.messages import Setup

logger = logging.getLogger("vllm.vllm_ssd.draft")

_STARTED = "VLLM_SSD_DRAFT_SERVER"
"""Set in the environment of the process that is to serve; it takes it out again."""


@dataclass(kw_only=True)
class Options:
    """What the command line says; names as there."""

    listen: str
    key_file: str | None
    metrics_port: int | None
    metrics_host: str
    max_targets: int
    max_requests: int
    vocab_size: int | None
    trust_remote_code: bool
    draft: dict[str, Any]
    """The options of :class:`SSDConfig` that are about the draft."""


def run(options: Options) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CommandError: an option is wrong, or the model or the address cannot be used.
    """
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda *_: sys.exit())  # nobody is served yet
    try:
        config = SSDConfig.parse(options.draft)
        address, key = _listens_at(options)
        cores = _cores(config)
        _start_anew(cores, _device(config))
        setup, kv_cache_bytes = plan(config, options)
        _serve(setup, kv_cache_bytes, options, address, key)
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(str(error).removeprefix("ssd: ")) from error
    # Without the interpreter's shutdown: the engine holds threads and compiled code.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def core_numbers(text: str) -> list[int]:
    """``"2,3"`` as numbers.

    Raises:
        CommandError: it is not that.
    """
    try:
        return [int(core) for core in text.split(",")]
    except ValueError:
        raise CommandError(f"--cores {text}: give core numbers, as 2,3") from None


def _listens_at(options: Options) -> tuple[Address, Key | None]:
    address = parse_address(options.listen)
    if options.key_file is not None:
        return address, read_key(options.key_file)
    if isinstance(address, TCPAddress):
        raise ValueError(
            f"--listen {options.listen}: TCP needs a key; make one with `vllm-ssd draft-key FILE` "
            "and give --key-file FILE here and the option 'draft_key_file' to the targets"
        )
    return address, None


def _cores(config: SSDConfig) -> list[int]:
    """The cores to run on; empty for where the system puts it."""
    from vllm_ssd.cli.vllm_command import installed_build, runs_on_cpu

    if not runs_on_cpu(installed_build()):
        return []
    allowed = available_cores()
    missing = [core for core in config.draft_cpu_cores or () if core not in allowed]
    if missing:
        raise ValueError(f"--cores: core {missing[0]} is not available; use some of {allowed}")
    return config.draft_cpu_cores or allowed


def _device(config: SSDConfig) -> str | None:
    """The one CUDA device to run on, as ``CUDA_VISIBLE_DEVICES`` names it; None for the first."""
    index = device_index(config.draft_device)
    if index is None:
        return None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device.strip() for device in seen.split(",")] if seen else None
    if devices is not None and index >= len(devices):
        raise ValueError(f"--device {config.draft_device}: CUDA_VISIBLE_DEVICES is {seen}")
    return str(index) if devices is None else devices[index]


def _start_anew(cores: list[int], device: str | None) -> None:
    """Start this program again: OpenMP is preloaded, and counts its cores, at the start only."""
    if os.environ.pop(_STARTED, None):
        return
    if cores:
        os.sched_setaffinity(0, cores)
    environment = draft_environment(with_openmp(), len(cores), device) | {_STARTED: "1"}
    run_python(sys.orig_argv[1:], environment)


def plan(config: SSDConfig, options: Options) -> tuple[Setup, int]:
    """How the model is brought up, and the size of its KV cache (0: what vLLM finds).

    Raises:
        ValueError: an option is wrong, or the model cannot be used.
        RuntimeError: this vLLM is not supported.
    """
    from msgspec.structs import replace
    from vllm.platforms import current_platform

    from vllm_ssd import compat
    from vllm_ssd.draft_checks import check_device, checked_draft
    from vllm_ssd.draft_vocab import select_draft_vocab
    from vllm_ssd.serving import kv_cache_on_cpu
    from vllm_ssd.target import memory
    from vllm_ssd.target.draft_config import in_place_of_target
    from vllm_ssd.target.draft_setup import batch_size, setup_of

    compat.check_vllm_version()
    on_cpu = current_platform.is_cpu()
    count = None if on_cpu else current_platform.device_count()
    wanted = config.draft_device
    if device_index(wanted) is not None:
        wanted = "cuda"  # this process sees no other device
    check_device(wanted, current_platform.device_name, count)
    own = in_place_of_target(config, options.trust_remote_code)
    draft = checked_draft(config, own)
    draft_vocab = select_draft_vocab(config, own, draft)
    vocab_size = min(options.vocab_size or own.get_vocab_size(), own.get_vocab_size())
    if draft_vocab is not None:
        draft_vocab = draft_vocab[draft_vocab < vocab_size]
        if not len(draft_vocab):
            raise ValueError(
                f"--draft-vocab: it has no token below --vocab-size {vocab_size}; raise that, or "
                "leave one of the two out"
            )
    batch = batch_size(config, options.max_requests, on_cpu)
    setup = setup_of(config, own, draft, draft_vocab, batch, on_cpu)
    size = config.draft_kv_cache_memory_bytes or 0
    per_token = memory.draft_kv_bytes_per_token(draft)
    if on_cpu and not size:
        size = kv_cache_on_cpu(options.max_requests * draft.max_model_len * per_token)
    if size:
        block = memory.block_size(on_cpu)
        memory.check_kv_cache(size, per_token, draft.max_model_len, block)
    return replace(setup, vocab_size=vocab_size), size


def _serve(
    setup: Setup, kv_cache_bytes: int, options: Options, address: Address, key: Key | None
) -> None:
    from vllm_ssd.cli.server_metrics import serve_metrics
    from vllm_ssd.draft.server import DraftServer
    from vllm_ssd.serving import bring_up
    from vllm_ssd.vocabulary import tokenizer_hash
    from vllm_ssd.wire.listener import Listener

    revision = setup.engine_args.get("revision")
    vocabulary = tokenizer_hash(
        setup.engine_args["model"], revision, trust_remote_code=options.trust_remote_code
    )
    server = DraftServer(options.max_targets)
    if options.metrics_port is not None:
        serve_metrics(server, options.metrics_host, options.metrics_port)
    # An address that is in use is found out before anything is loaded.
    listener = Listener(address, key)
    try:
        offer = bring_up(server, setup, kv_cache_bytes, vocabulary)
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, lambda *_: server.stop())
        logger.info("ssd: draft server for %s listens on %s", offer.model, listener.address)
        server.serve_all(listener)
    finally:
        listener.close()
