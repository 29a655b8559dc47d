"""What decides: trees, fan-out, row budget, counters. No vLLM, no sockets."""
