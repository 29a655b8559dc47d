"""What a process that fails, or hangs, leaves in its log for whoever reads the report."""

from __future__ import annotations

import faulthandler
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

LOG_CHARACTERS = 6000
"""So much of the log is in the report."""


@contextmanager
def explained(limit_s: int) -> Iterator[None]:
    """Log the traceback of an error; after so many seconds all threads' stacks, and end."""
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
