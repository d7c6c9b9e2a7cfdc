"""``sketch-plugins run``: runs a program, which then knows our optimizers, as do the processes that it starts."""
