"""``sketch-plugins check``: every kernel beside its eager definition, on a device that nobody here has."""
