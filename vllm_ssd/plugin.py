"""The entry point: makes ``{"method": "ssd", ...}`` a method of vLLM's speculative decoding.

One vLLM method is patched, ``EngineArgs.create_speculative_config``; it only rewrites the
dictionary into vLLM's official spelling: the ``custom_class`` method with our proposer, our worker
as ``worker_cls``, our options in ``additional_config``. Everything after that is plain vLLM.
"""

from __future__ import annotations

from typing import Any

METHOD = "ssd"
PROPOSER = "vllm_ssd.target.proposer.SSDProposer"
WORKER = "vllm_ssd.target.worker.SSDWorker"


def register() -> None:
    """Called by vLLM in each of its processes (``vllm.general_plugins``)."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.compile_key import keep_compile_key

    original = EngineArgs.create_speculative_config
    if getattr(original, "_vllm_ssd", False):
        return

    def create_speculative_config(
        self: EngineArgs, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        options = self.speculative_config
        if isinstance(options, dict):
            if options.get("method") == METHOD:
                _rewrite(self, options, target_model_config, target_parallel_config)
            # Also on a second call with the same arguments, and for the plain spelling.
            if (self.speculative_config or {}).get("model") == PROPOSER:
                _use_our_worker(target_parallel_config)
                keep_compile_key(self)
        return original(self, target_model_config, target_parallel_config)

    create_speculative_config._vllm_ssd = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _rewrite(engine_args: Any, options: dict[str, Any], target: Any, parallel: Any) -> None:
    """Check the options and put vLLM's official spelling in their place."""
    from vllm_ssd.affinity import available_cores
    from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
    from vllm_ssd.preflight import check, check_cores

    own = {name: value for name, value in options.items() if name != "method"}
    config = SSDConfig.parse(own)
    # Here, not in the workers: vLLM binds those to their own cores.
    check_cores(config.draft_cpu_cores, available_cores())
    check(config, target, parallel, engine_args.async_scheduling)
    engine_args.additional_config = {
        **(engine_args.additional_config or {}),
        ADDITIONAL_CONFIG_KEY: config.model_dump(exclude_unset=True),
    }
    engine_args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": config.num_speculative_tokens,
    }


def _use_our_worker(parallel: Any) -> None:
    if parallel.worker_cls == "auto":
        parallel.worker_cls = WORKER
