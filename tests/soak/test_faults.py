"""Every fault under load costs no request and no text."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("draft", ["own", "shared"])
def test_nothing_is_lost_whatever_breaks(draft: str) -> None:
    command = [sys.executable, "-m", "tests.soak.faults", "--draft", draft, "--quiet", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
