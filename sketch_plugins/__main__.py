"""``python -m sketch_plugins``: the same as the ``sketch-plugins`` command."""

import sys

from sketch_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
