"""The version of the package, from its metadata."""

__version__ = "0.1.0"
