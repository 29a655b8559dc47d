"""How a draft is reached: a process of the target's own, or a server at an address."""
