"""Inside vLLM's worker: what the front-ends of its model runners share, and their folders."""
