"""What the target's worker and the draft process say to each other, and how it travels."""
