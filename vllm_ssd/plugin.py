"""The entry point: makes ``{"method": "ssd", ...}`` a method of vLLM's speculative decoding.

One vLLM method is patched, ``EngineArgs.create_speculative_config``; it only rewrites the
dictionary into vLLM's official spelling: the ``custom_class`` method with our proposer, our worker
as ``worker_cls``, our options in ``additional_config``. Everything after that is plain vLLM.
"""

from __future__ import annotations

from typing import Any

METHOD = "ssd"
PROPOSER = "vllm_ssd.target.v1.proposer.SSDProposer"
WORKER = "vllm_ssd.target.v1.worker.SSDWorker"

_FLAGS = {"method": "method", "model": "model", "num_speculative_tokens": "tokens"}
"""What vLLM's ``--spec-...`` options set in the speculative config."""


def register() -> None:
    """Called by vLLM in each of its processes (``vllm.general_plugins``)."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.compile_key import keep_compile_key
    from vllm_ssd.stats_file import name_engine

    original = EngineArgs.create_speculative_config
    if getattr(original, "_vllm_ssd", False):
        return

    def create_speculative_config(
        self: EngineArgs, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        options = _gather(self)
        if isinstance(options, dict):
            if options.get("method") == METHOD:
                _rewrite(self, options, target_model_config, target_parallel_config)
            # Also on a second call with the same arguments, and for the plain spelling.
            if (self.speculative_config or {}).get("model") == PROPOSER:
                _use_our_worker(target_parallel_config)
                keep_compile_key(self)
                of_several = self._api_process_count > 1 and self._api_process_rank >= 0
                name_engine(inherits=of_several)
        return original(self, target_model_config, target_parallel_config)

    create_speculative_config._vllm_ssd = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _gather(engine_args: Any) -> Any:
    """The speculative config; if its method is ours, with ``--spec-model`` and the like added.

    vLLM itself would add them after us.

    Raises:
        ValueError: an option is given in both places.
    """
    options = engine_args.speculative_config or {}
    flags = {name: getattr(engine_args, f"spec_{flag}") for name, flag in _FLAGS.items()}
    given = {name: value for name, value in flags.items() if value is not None}
    if not isinstance(options, dict) or METHOD not in (options.get("method"), given.get("method")):
        return engine_args.speculative_config
    options = {name.replace("-", "_"): value for name, value in options.items()}
    for name, value in given.items():
        if name in options:
            raise ValueError(
                f"ssd: --spec-{_FLAGS[name]} = {value!r}, but the speculative config has {name!r} "
                f"= {options[name]!r} already; leave one of them out"
            )
        setattr(engine_args, f"spec_{_FLAGS[name]}", None)  # or vLLM would find it twice
    return {**options, **given}


def _rewrite(engine_args: Any, options: dict[str, Any], target: Any, parallel: Any) -> None:
    """Check the options and put vLLM's official spelling in their place."""
    from vllm_ssd.affinity import available_cores
    from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
    from vllm_ssd.draft_checks import check_cores
    from vllm_ssd.preflight import absolute_paths, check

    own = {name: value for name, value in options.items() if name != "method"}
    config = absolute_paths(SSDConfig.parse(own))
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
        # With the draft's probabilities: vLLM warms that way of sampling up.
        "draft_sample_method": "greedy" if config.draft_sampling == "greedy" else "probabilistic",
    }


def _use_our_worker(parallel: Any) -> None:
    """Have vLLM start our worker, or one derived from it that the user has chosen."""
    if parallel.worker_cls in ("auto", WORKER):
        parallel.worker_cls = WORKER
        return
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_ssd.target.v1.worker import SSDWorker

    if not issubclass(resolve_obj_by_qualname(parallel.worker_cls), SSDWorker):
        raise ValueError(
            f"ssd: worker_cls = {parallel.worker_cls!r} is not SSDWorker; leave it out, or derive "
            f"it from {WORKER}"
        )
