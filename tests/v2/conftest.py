"""V2's engines run where the environment asks for V2, in a pytest run of their own (``make test``):
vLLM looks for Triton once a process."""

from __future__ import annotations

import os

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from tests.v2.interpreter import prepare

    prepare()
else:
    collect_ignore = ["engines"]
