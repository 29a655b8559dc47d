"""Chat with a server that runs SSD; below each answer, as it comes, what speculation does.

Start the server as in examples/serve/README.md, then

    python examples/chat.py [--url http://localhost:8000]

The figures are the server's own, from its ``/metrics``: with other clients they count those too.
"""

from __future__ import annotations

import argparse
import time
import urllib.request
from collections import defaultdict
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

EVERY_SECONDS = 0.5
"""How often the figures are read during an answer."""


def counters(url: str) -> dict[str, float]:
    """The server's metrics of SSD, summed over their labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        found: dict[str, float] = defaultdict(float)
        for family in families:
            if family.name.startswith("vllm:ssd_"):
                for sample in family.samples:
                    found[sample.name.removeprefix("vllm:ssd_")] += sample.value
    return found


class Figures:
    """What speculation has done since an answer began.

    Args:
        url: the server's.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = counters(url)
        self._began = time.perf_counter()

    def line(self, tokens: int) -> str:
        """A line of it.

        Args:
            tokens: of the answer so far.
        """
        new = {
            name: value - self._before.get(name, 0.0) for name, value in counters(self._url).items()
        }
        hits, look_ups = new.get("hits_total", 0.0), new.get("look_ups_total", 0.0)
        accepted = new.get("accepted_tokens_total", 0.0)
        return (
            f"{tokens} tokens, {tokens / (time.perf_counter() - self._began):.0f} a second; "
            f"{hits:.0f} of {look_ups:.0f} look-ups hit; {accepted:.0f} drafted tokens accepted"
        )


def answer(stream: Any, figures: Figures, console: Console) -> str:
    """Show an answer as it comes, and the figures below it.

    Args:
        stream: the server's chunks.
        figures: those since it was asked.
        console: the terminal.

    Returns:
        The answer.
    """
    said, tokens, line, read = "", 0, "", time.perf_counter()
    # What is not a terminal gets the last state alone.
    with Live(console=console, vertical_overflow="visible") as live:
        for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
            if time.perf_counter() - read > EVERY_SECONDS:
                line, read = figures.line(tokens), time.perf_counter()
            live.update(Group(Text(said), Text(line, style="dim")))
        live.update(Group(Text(said), Text(figures.line(tokens), style="dim")))
    return said


def main() -> None:
    """Read questions until the end of input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    client = OpenAI(base_url=f"{options.url}/v1", api_key="none")
    (model, *_) = client.models.list().data
    console = Console()
    console.print(f"[dim]{model.id}; an empty line or ctrl-D ends[/]")
    messages: list[Any] = []
    while True:
        try:
            question = console.input("[bold]> [/]")
        except EOFError:
            return
        if not question.strip():
            return
        messages.append({"role": "user", "content": question})
        figures = Figures(options.url)
        stream = client.chat.completions.create(
            model=model.id,
            messages=messages,
            stream=True,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            # vLLM's: how many tokens there are so far, in every chunk.
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
        messages.append({"role": "assistant", "content": answer(stream, figures, console)})


if __name__ == "__main__":
    main()
