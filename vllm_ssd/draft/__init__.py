"""The draft process: keeps a branch for every likely outcome and decodes them all in one batch."""
