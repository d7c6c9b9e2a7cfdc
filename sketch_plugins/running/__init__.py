"""``sketch-plugins run``: other people's programs, and the processes that they start, with our optimizers known."""
