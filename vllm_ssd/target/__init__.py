"""Inside vLLM's worker: the proposer, the worker, and their line to the draft process."""
