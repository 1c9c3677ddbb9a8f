"""Before and around a run: will it fit, does the layout work, how to start it."""
