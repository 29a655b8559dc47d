"""The front-end of vLLM's V1 model runner: proposals from host lists, at the end of a step."""
