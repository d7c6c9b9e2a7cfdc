"""``sketch-plugins check``: compare every kernel with its eager definition, on the user's own device."""
