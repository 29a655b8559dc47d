"""The example runs as its README says, with the models of the demonstration."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.conftest import ray
from vllm_ssd.cli.models import DemoModels

SCRIPT = Path(__file__).parents[2] / "examples" / "ray" / "replicas.py"


@pytest.mark.slow
def test_replicas_share_one_draft(demo_pair: DemoModels) -> None:
    assert not ray.is_initialized()
    done = subprocess.run(
        [sys.executable, "-m", "vllm_ssd.cli.env", str(SCRIPT), "--max-tokens", "24"],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^> .+\n.+", done.stdout, re.MULTILINE)) == 4
    rates = re.findall(r"^replica \d: hit rate (\d+)%", done.stdout, re.MULTILINE)
    assert [int(rate) > 0 for rate in rates] == [True, True]
    assert re.findall(r"^drafts: (.+)$", done.stdout, re.MULTILINE) == ["vllm_ssd_draft_example"]
