"""The dashboard's queries, as `examples/monitoring/dashboard.py` computes them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
NONE: frozenset[tuple[str, str]] = frozenset()


@pytest.fixture(scope="module")
def queries() -> ModuleType:
    """The file beside the program."""
    spec = importlib.util.spec_from_file_location("queries", MONITORING / "queries.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["queries"] = module
    spec.loader.exec_module(module)
    return module


def labels(**of: str) -> frozenset[tuple[str, str]]:
    return frozenset(of.items())


def test_a_rate_is_taken_over_its_window_and_knows_counters_that_began_anew(
    queries: ModuleType,
) -> None:
    values = [0.0, 100.0, 130.0, 5.0, 15.0]  # at 10 s each; the process was started again
    samples = [queries.Sample(10.0 * i, {"n": {NONE: value}}) for i, value in enumerate(values)]
    query = queries.parse("sum(rate(n[$__rate_interval]))", 30.0)
    assert query(samples)[NONE] == pytest.approx((30 + 5 + 10) / 30)
    assert queries.parse("sum(increase(n[5m]))", 30.0)(samples)[NONE] == 145.0


def test_sums_keep_the_label_they_are_by(queries: ModuleType) -> None:
    old = {labels(reason="late", engine="0"): 1.0, labels(reason="fork", engine="0"): 0.0}
    new = {
        labels(reason="late", engine="0"): 3.0,
        labels(reason="late", engine="1"): 4.0,
        labels(reason="fork", engine="0"): 5.0,
    }
    samples = [queries.Sample(0.0, {"misses": old}), queries.Sample(10.0, {"misses": new})]
    found = queries.parse("sum by (reason) (rate(misses[$__rate_interval]))", 20.0)(samples)
    assert found == pytest.approx({labels(reason="late"): 0.6, labels(reason="fork"): 0.5})


def test_arithmetic_and_what_is_not_there(queries: ModuleType) -> None:
    samples = [
        queries.Sample(float(i), {"hits": {NONE: 3.0 * i}, "looks": {NONE: 4.0 * i}})
        for i in range(5)
    ]
    whole = "1 + sum(rate(hits[1m])) / sum(rate(looks[1m]))"
    assert queries.parse(whole, 1.0)(samples)[NONE] == 1.75
    assert queries.parse("sum(rate(hits[1m])) / sum(rate(absent[1m]))", 1.0)(samples) == {}
    assert queries.parse("min(hits)", 1.0)(samples) == {NONE: 12.0}


def test_quantiles_are_linear_within_a_bucket(queries: ModuleType) -> None:
    bounds = {"0.1": 10.0, "0.2": 30.0, "0.4": 40.0, "+Inf": 40.0}
    none = {labels(le=bound): 0.0 for bound in bounds}
    some = {labels(le=bound): count for bound, count in bounds.items()}
    samples = [queries.Sample(0.0, {"t_bucket": none}), queries.Sample(1.0, {"t_bucket": some})]
    text = "histogram_quantile({}, sum by (le) (rate(t_bucket[1m])))"
    assert queries.parse(text.format(0.5), 1.0)(samples)[NONE] == pytest.approx(0.15)
    assert queries.parse(text.format(0.875), 1.0)(samples)[NONE] == pytest.approx(0.3)
    nothing = [queries.Sample(0.0, {"t_bucket": none})] * 2
    assert math.isnan(queries.parse(text.format(0.5), 1.0)(nothing)[NONE])


@pytest.mark.parametrize(
    "text", ["max(n)", "n * 2", "sum(n", "sum(rate(n[1m]", "n n", "rate(n[5s])"]
)
def test_everything_else_is_refused(queries: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        queries.parse(text, 1.0)


def test_all_queries_of_the_dashboard_are_known(queries: ModuleType) -> None:
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    for panel in panels:
        for target in panel["targets"]:
            assert callable(queries.parse(target["expr"], 20.0))
