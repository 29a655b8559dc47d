"""Plain vLLM with its V1 runner: ``python -m tests.v2.engines.plain_v1 ASKED ANSWERED``, files with
the model's folder and the workloads, and with what it answers."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from tests.engine.harness import Engine
from tests.v2.engines.harness import ARGUMENTS


def main(asked: Path, answered: Path) -> None:
    """Answer, and end."""
    model, workloads = pickle.loads(asked.read_bytes())
    engine = Engine(model, **ARGUMENTS)
    config: Any = engine.llm.llm_engine.vllm_config
    assert not config.use_v2_model_runner
    found = {name: engine.run(jobs) for name, jobs in workloads.items()}
    engine.close()
    answered.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
