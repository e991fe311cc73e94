"""The version of this package, apart from `__init__`, which leads to every part of it."""

__version__ = "0.1.0"
