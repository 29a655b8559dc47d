"""Inside vLLM's worker: the proposer, the worker, and the client of the draft process."""
