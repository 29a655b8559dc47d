"""On the path of worker processes, which Python starts with it: they too have Triton interpreted.

Not so any other process that starts meanwhile, the draft's among them.
"""

import sys

if "--multiprocessing-fork" in sys.orig_argv:
    from tests.v2.interpreter import prepare

    prepare()
