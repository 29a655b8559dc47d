"""The decisions: trees, outcomes, forks, the budget for branches, counters. No vLLM, no sockets."""
