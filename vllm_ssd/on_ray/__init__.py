"""A draft that Ray places: a named actor, which engines find and then talk to directly."""
