"""An engine in a process of its own that decodes what it is told to.

``python -m tests.shared.script OPTIONS``; then each line of its input is an :class:`Order` as JSON,
and each line of its output a :class:`Report`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field


@dataclass
class Order:
    """What to decode."""

    texts: list[list[int]]
    max_tokens: int
    times: int = 1
    """A report each."""
    aborted: list[int] = field(default_factory=list)
    """Which of the texts are aborted in mid-flight."""


@dataclass
class Report:
    """What has come of it."""

    answers: list[list[int]]
    """Of texts that were aborted, what there was by then."""
    stats: dict[str, float]
    """By how much the plugin's counters have grown, and vLLM's of accepted tokens."""
    longest_step: float
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Of the look-ups."""
        return self.stats["hits"] / max(1.0, self.stats["look_ups"])


def main() -> None:
    """Start the engine, then do as told until the input ends."""
    from tests.robustness import harness
    from tests.robustness.harness import Decoding
    from tests.tiny_models import tiny_models

    options = json.loads(sys.argv[1])
    with harness.running_engine(tiny_models(), options["speculative_config"]) as llm:
        print(json.dumps("up"), flush=True)
        for line in sys.stdin:
            order = Order(**json.loads(line))
            for _ in range(order.times):
                before, began = harness.stats(llm), time.monotonic()
                decoding = Decoding(llm, order.texts, order.max_tokens)
                for count, index in enumerate(order.aborted, 1):
                    decoding.steps(count)
                    decoding.abort(index)
                answers = decoding.finish()
                seconds = time.monotonic() - began
                after = harness.stats(llm)
                grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
                report = Report(answers, grown, decoding.longest_step, seconds)
                print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
