"""The messages between the target's worker and the draft process, and their channel."""
