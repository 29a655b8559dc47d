"""The front-end for vLLM's V2 model runner: look-up on the device, no host in the loop."""
