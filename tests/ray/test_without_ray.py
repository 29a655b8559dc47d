"""Without Ray the option is refused at once; what to install is said."""

from __future__ import annotations

import subprocess
import sys

from tests.tiny_models import TinyModels

SCRIPT = """
import sys
sys.modules["ray"] = None  # as if it were not installed
from vllm import LLM
try:
    LLM(model={target!r}, speculative_config={{"method": "ssd", "model": {draft!r},
        "num_speculative_tokens": 3, "draft_placement": "ray"}})
except Exception as error:
    print("said:", error)
"""


def test_what_to_install_is_said(tiny_pair: TinyModels) -> None:
    script = SCRIPT.format(target=str(tiny_pair.target), draft=str(tiny_pair.near))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Ray is not installed; pip install 'vllm-ssd[ray]'" in done.stdout, done.stderr[-2000:]
