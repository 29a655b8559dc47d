"""Answer some prompts with SSD in this process, and print what speculation did.

    python -m vllm_ssd.cli.env examples/offline.py          # on CPU: preloads Intel's OpenMP
    python examples/offline.py --target BIG --draft SMALL   # on GPUs

Without models those of the demonstration are used (fetched on the first run).
"""

from __future__ import annotations

import argparse

QUESTIONS = (
    "Write a short story about a lighthouse.",
    "Explain how a bicycle stays upright.",
    "Give three tips for learning a language.",
)


def main() -> None:
    """Start the engine, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    if (options.target is None) != (options.draft is None):
        parser.error("name both models, or none")

    from vllm import LLM, SamplingParams

    import vllm_ssd
    from vllm_ssd.cli.models import demo_models

    if options.target is None:
        target, draft = map(str, demo_models())
    else:
        target, draft = options.target, options.draft
    llm = LLM(
        model=target,
        speculative_config={
            "method": "ssd",
            "model": draft,
            "num_speculative_tokens": options.num_speculative_tokens,
        },
        max_model_len=2048,
        max_num_seqs=8,
        # Little, so that it fits beside other programs; leave it out on a machine of your own.
        kv_cache_memory_bytes=1 << 30,
    )
    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    chats = [[{"role": "user", "content": question}] for question in options.questions]
    for question, output in zip(options.questions, llm.chat(chats, params), strict=True):
        print(f"\n> {question}\n{output.outputs[0].text.strip()}")

    stats = vllm_ssd.get_stats(llm)
    length = 1 + stats["tokens_accepted"] / max(1.0, stats["verifications"])
    print(f"\nhit rate {stats.get('hit_rate', 0.0):.0%}, acceptance length {length:.2f}")


if __name__ == "__main__":  # vLLM's worker processes import this file
    main()
