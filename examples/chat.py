"""Chat with a server that runs SSD; after each answer, what speculation did meanwhile.

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
from rich.console import Console


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
    before = counters(options.url)
    while True:
        try:
            question = console.input("[bold]> [/]")
        except EOFError:
            return
        if not question.strip():
            return
        messages.append({"role": "user", "content": question})
        began, tokens, said = time.perf_counter(), 0, ""
        for chunk in client.chat.completions.create(
            model=model.id,
            messages=messages,
            stream=True,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            stream_options={"include_usage": True},
        ):
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                said += choice.delta.content or ""
                console.print(choice.delta.content or "", end="", markup=False, highlight=False)
        messages.append({"role": "assistant", "content": said})
        seconds = time.perf_counter() - began
        now = counters(options.url)
        new = {name: value - before.get(name, 0.0) for name, value in now.items()}
        before = now
        hits, look_ups = new.get("hits_total", 0.0), new.get("look_ups_total", 0.0)
        accepted = new.get("accepted_tokens_total", 0.0)
        console.print(
            f"\n[dim]{tokens} tokens, {tokens / seconds:.0f} a second; {hits:.0f} of "
            f"{look_ups:.0f} look-ups hit; {accepted:.0f} drafted tokens accepted[/]"
        )


if __name__ == "__main__":
    main()
