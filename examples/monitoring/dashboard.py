"""Draw the dashboard of ``grafana.json`` from a server's ``/metrics``, without Grafana.

    python examples/monitoring/dashboard.py [--url http://127.0.0.1:8000] [--seconds 300]

Reads ``/metrics`` every two seconds, for as long as it is told or until it is interrupted, and then
draws the panels, each with the queries that Grafana would send to Prometheus.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter
from prometheus_client.parser import text_string_to_metric_families
from queries import Labels, Sample, parse

DASHBOARD = Path(__file__).with_name("grafana.json")
EVERY_SECONDS = 2.0
RATE_INTERVAL = 20.0
"""Seconds that rates are taken over. (Grafana's is four times the interval between two reads.)"""
SUFFIXES = {"percentunit": (100.0, " %"), "s": (1e3, " ms"), "ops": (1.0, " /s")}


def read(url: str) -> Sample:
    """What ``/metrics`` says now.

    Args:
        url: the server's.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            values.setdefault(one.name, {})[frozenset(one.labels.items())] = one.value
    return Sample(time.monotonic(), values)


def record(url: str, seconds: float) -> list[Sample]:
    """Read again and again; a server that has ended ends it too.

    Args:
        url: the server's.
        seconds: how long.
    """
    samples = [read(url)]
    with suppress(KeyboardInterrupt, OSError):
        while samples[-1].time - samples[0].time < seconds:
            time.sleep(EVERY_SECONDS)
            samples.append(read(url))
    return samples


def lines(target: dict[str, str], samples: list[Sample]) -> dict[str, list[float]]:
    """The values of one of a panel's queries at all times but the first, by legend."""
    query = parse(target["expr"], RATE_INTERVAL)
    found: dict[str, list[float]] = {}
    for index in range(1, len(samples)):
        for labels, value in query(samples[: index + 1]).items():
            legend = target["legendFormat"]
            for name, said in labels:
                legend = legend.replace("{{" + name + "}}", said)
            found.setdefault(legend, [float("nan")] * (len(samples) - 1))[index - 1] = value
    return found


def draw(samples: list[Sample], output: Path) -> None:
    """All panels, where the dashboard has them.

    Args:
        samples: what was read, at least twice.
        output: a picture, of the kind its name says.
    """
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    rows = sorted({panel["gridPos"]["y"] for panel in panels})
    mpl.rcParams.update({"font.size": 8, "svg.fonttype": "none"})
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 2.1 * len(rows)), squeeze=False)
    times = [one.time - samples[0].time for one in samples[1:]]
    for panel in panels:
        where = panel["gridPos"]
        ax = axes[rows.index(where["y"])][int(where["x"] > 0)]
        factor, suffix = SUFFIXES.get(panel["fieldConfig"]["defaults"].get("unit"), (1.0, ""))
        for target in panel["targets"]:
            for legend, values in lines(target, samples).items():
                ax.plot(times, [factor * value for value in values], label=legend, linewidth=1.2)
        ax.set_title(panel["title"], loc="left", fontweight="bold")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _, of=suffix: f"{value:g}{of}"))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(frameon=False, ncols=3, loc="upper left")
    for ax in axes[-1]:
        ax.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(output)


def main() -> None:
    """Read, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--output", type=Path, default=Path("dashboard.svg"))
    options = parser.parse_args()
    samples = record(options.url, options.seconds)
    if len(samples) == 1:
        parser.error("the server ended before it was read twice")
    draw(samples, options.output)
    print(f"{len(samples)} readings, drawn to {options.output}")


if __name__ == "__main__":
    main()
