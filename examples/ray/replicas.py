"""Two replicas of a target, each a Ray actor, and one draft that they share.

    python -m vllm_ssd.cli.env examples/ray/replicas.py                  # on CPU
    python examples/ray/replicas.py --target BIG --draft SMALL --gpus 1  # on a cluster with GPUs

Without models those of the demonstration are used (fetched on the first run).
"""

from __future__ import annotations

import argparse
from typing import Any

import ray

QUESTIONS = (
    "Write a short story about a lighthouse.",
    "Explain how a bicycle stays upright.",
    "Give three tips for learning a language.",
    "Why is the sky blue?",
)


class Replica:
    """One engine.

    Args:
        target: its model.
        draft: the draft model, for the replica that is first to ask for it.
        tokens: K.
        seconds: how long to wait for Ray to place the draft and for that to load.
    """

    def __init__(self, target: str, draft: str, tokens: int, seconds: float) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=target,
            speculative_config={
                "method": "ssd",
                "model": draft,
                "num_speculative_tokens": tokens,
                "draft_placement": "ray",
                "draft_name": "example",
                "draft_startup_timeout_s": seconds,
            },
            max_model_len=1024,
            max_num_seqs=4,
            # Little, so that it fits beside other programs; leave it out on machines of your own.
            kv_cache_memory_bytes=256 << 20,
        )

    def answer(self, question: str, max_tokens: int) -> str:
        """The answer to one question."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        chat: list[Any] = [{"role": "user", "content": question}]
        return str(self._llm.chat(chat, params, use_tqdm=False)[0].outputs[0].text).strip()

    def stats(self) -> dict[str, float]:
        """What speculation did."""
        import vllm_ssd

        return vllm_ssd.get_stats(self._llm)

    def close(self) -> None:
        """End the engine; the draft ends a little after the last one."""
        self._llm.llm_engine.engine_core.shutdown()


def main() -> None:
    """Start the replicas, let them answer in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="of a replica")
    parser.add_argument("--cpus", type=float, default=0.5, help="of a replica")
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--startup-seconds", type=float, default=600.0)
    options = parser.parse_args()
    if (options.target is None) != (options.draft is None):
        parser.error("name both models, or none")
    if options.target is None:
        from vllm_ssd.cli.models import demo_models

        options.target, options.draft = map(str, demo_models())

    ray.init()  # a cluster that runs is named by RAY_ADDRESS
    # On CPU: Ray gives each replica its number of threads, so vLLM need not bind them to cores,
    # which would be the same ones for all.
    environment = {} if options.gpus else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    replica = ray.remote(Replica).options(
        num_cpus=options.cpus, num_gpus=options.gpus, runtime_env={"env_vars": environment}
    )
    arguments = options.target, options.draft, options.num_speculative_tokens
    replicas = [
        replica.remote(*arguments, options.startup_seconds) for _ in range(options.replicas)
    ]
    asked = [
        replicas[number % len(replicas)].answer.remote(question, options.max_tokens)
        for number, question in enumerate(QUESTIONS)
    ]
    for question, answer in zip(QUESTIONS, ray.get(asked), strict=True):
        print(f"\n> {question}\n{answer}")
    print()
    for number, stats in enumerate(ray.get([each.stats.remote() for each in replicas])):
        length = 1 + stats["tokens_accepted"] / max(1.0, stats["verifications"])
        print(
            f"replica {number}: hit rate {stats.get('hit_rate', 0.0):.0%}, "
            f"acceptance length {length:.2f}"
        )
    drafts = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    print(f"drafts: {', '.join(drafts)}")
    ray.get([each.close.remote() for each in replicas])


if __name__ == "__main__":
    main()
