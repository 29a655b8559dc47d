"""The ``vllm-ssd`` command."""


class CommandError(Exception):
    """What stops a command and how to mend it, in one sentence for the person who ran it."""
