"""A user's script: starts an engine and decodes the same prompts for ever, one line an answer.

SIGUSR1 raises an exception in it, SIGUSR2 has it end after the answer it waits for.

``python -m tests.robustness.script '{"model": ..., "speculative_config": ..., "max_tokens": ...}'``
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any, NoReturn


def fail(*of: Any) -> NoReturn:
    """What goes wrong in the caller.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("the caller's own")


def main() -> None:
    """Read the arguments, start, decode until the process is ended."""
    from vllm import LLM

    from tests.robustness.harness import ENGINE, greedy

    options = json.loads(sys.argv[1])
    prompts = [{"prompt_token_ids": text} for text in options["texts"]]
    llm = LLM(
        model=options["model"],
        speculative_config=options["speculative_config"],
        **ENGINE,
    )
    ending: list[Any] = []
    signal.signal(signal.SIGUSR1, fail)
    signal.signal(signal.SIGUSR2, lambda *of: ending.append(of))
    while not ending:
        outputs = llm.generate(prompts, greedy(options["max_tokens"]), use_tqdm=False)
        print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]), flush=True)


if __name__ == "__main__":
    main()
