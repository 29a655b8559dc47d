"""A draft server for the benchmarks that need one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import KV_BYTES
from vllm_ssd.affinity import available_cores
from vllm_ssd.wire.keys import write_key


@contextmanager
def draft_server(
    draft: str,
    dtype: str,
    *,
    enforce_eager: bool = True,
    port: int | None = None,
    targets: int = 8,
) -> Iterator[dict[str, Any]]:
    """A server on the last core, once it listens.

    Args:
        draft: its model.
        dtype: what it computes in.
        enforce_eager: whether it is not compiled.
        port: of TCP; None for a Unix socket.
        targets: the most that may use it.

    Yields:
        The options of targets that use it.

    Raises:
        RuntimeError: it did not come up.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, log = Path(folder, "key"), Path(folder, "log")
        address = f"unix://{folder}/socket" if port is None else f"tcp://127.0.0.1:{port}"
        options = {"draft_address": address}
        command = [sys.executable, "-m", "vllm_ssd.cli.main", "draft-server", "--model", draft]
        command += ["--listen", address, "--cores", str(available_cores()[-1]), "--dtype", dtype]
        command += ["--max-targets", str(targets)]
        command += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(KV_BYTES)]
        if enforce_eager:
            command += ["--enforce-eager"]
        if port is not None:
            write_key(key)
            command += ["--key-file", str(key)]
            options["draft_key_file"] = str(key)
        # Its log says when it listens.
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            while "listens on" not in log.read_text():
                if server.poll() is not None:
                    raise RuntimeError(log.read_text()[-2000:])
                time.sleep(0.1)
            yield options
        finally:
            server.terminate()
            server.wait()
