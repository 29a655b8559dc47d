"""The entry point: makes ``{"method": "ssd", ...}`` a method of vLLM's speculative decoding.

One vLLM method is patched, ``EngineArgs.create_speculative_config``; it only rewrites the
dictionary into vLLM's official spelling: our worker as ``worker_cls``, our options in
``additional_config``, and a method that the model runner takes. Everything after that is plain
vLLM.

vLLM decides which runner it takes. V1's method is ``custom_class`` with our proposer. V2 refuses
that; there ``ngram_gpu`` carries ours through vLLM's checks, and our worker replaces the speculator
that is built for it. It is the method that reserves no KV cache, loads no draft model, and goes
with asynchronous scheduling. For it vLLM keeps all texts on the device, where our look-up reads
them: ``max_num_seqs * max_model_len`` tokens of 4 bytes.
"""

from __future__ import annotations

from typing import Any

METHOD = "ssd"
PROPOSER = "vllm_ssd.target.v1.proposer.SSDProposer"
WORKER = "vllm_ssd.target.v1.worker.SSDWorker"
V2_METHOD = "ngram_gpu"
V2_WORKER = "vllm_ssd.target.v2.worker.SSDWorker"

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
            ours = _worker(self)
            if ours is not None:
                _use_our_worker(target_parallel_config, ours)
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
    from vllm_ssd.preflight import absolute_paths, check, takes_v2, warn_of_v2_options

    own = {name: value for name, value in options.items() if name != "method"}
    config = absolute_paths(SSDConfig.parse(own))
    # Here, not in the workers: vLLM binds those to their own cores.
    check_cores(config.draft_cpu_cores, available_cores())
    check(config, target, parallel, engine_args.async_scheduling)
    engine_args.additional_config = {
        **(engine_args.additional_config or {}),
        ADDITIONAL_CONFIG_KEY: config.model_dump(exclude_unset=True),
    }
    spelling: dict[str, Any] = {"method": V2_METHOD}
    if takes_v2(parallel):
        warn_of_v2_options(config)
    else:
        spelling = {
            "method": "custom_class",
            "model": PROPOSER,
            # With the draft's probabilities: vLLM warms that way of sampling up.
            "draft_sample_method": (
                "greedy" if config.draft_sampling == "greedy" else "probabilistic"
            ),
        }
    spelling["num_speculative_tokens"] = config.num_speculative_tokens
    engine_args.speculative_config = spelling


def _worker(engine_args: Any) -> str | None:
    """Our worker for the method that is configured; None if that is not ours."""
    from vllm_ssd.config import ADDITIONAL_CONFIG_KEY

    method = engine_args.speculative_config or {}
    if method.get("model") == PROPOSER:
        return WORKER
    ours = ADDITIONAL_CONFIG_KEY in (engine_args.additional_config or {})
    return V2_WORKER if ours and method.get("method") == V2_METHOD else None


def _use_our_worker(parallel: Any, ours: str) -> None:
    """Have vLLM start our worker, or one derived from it that the user has chosen."""
    if parallel.worker_cls in ("auto", ours):
        parallel.worker_cls = ours
        return
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if not issubclass(resolve_obj_by_qualname(parallel.worker_cls), resolve_obj_by_qualname(ours)):
        raise ValueError(
            f"ssd: worker_cls = {parallel.worker_cls!r} is not SSDWorker; leave it out, or derive "
            f"it from {ours}"
        )
