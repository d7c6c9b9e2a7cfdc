"""Python imports this file at its start, in the processes that a program under ``sketch-plugins run`` starts.

Only ``run`` puts this folder on PYTHONPATH (`sketch_plugins.running.children`). Any Python of any version and
environment may read the file, so it needs no package. Until a framework is imported, it only removes its folder from
the path.
"""

import os
import sys


class _Waiting(object):  # noqa: UP004
    """Calls ``sketch_plugins`` as soon as one of its triggers is about to be imported, and never again."""

    def __init__(self, triggers):
        self.triggers = triggers

    def find_spec(self, name, path=None, target=None):
        if name not in self.triggers or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            from sketch_plugins.running.children import join
        except ImportError:  # an environment without this package, or with another version of it
            return None
        join()
        # The loop that has called this finder does not see the finders that were just put in front of it.
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                return spec
        return None


_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]
if sys.version_info >= (3, 10) and os.environ.get("SKETCH_PLUGINS_RUN"):
    sys.meta_path.insert(0, _Waiting(os.environ["SKETCH_PLUGINS_RUN"].split(" ", 1)[0].split(",")))
# Import the sitecustomize that Python would have found without this one. If there is none, Python handles the
# ImportError in the usual way.
del sys.modules["sitecustomize"]
__import__("sitecustomize")
