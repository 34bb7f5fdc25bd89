"""Logging: one logger a package, printed to stderr so that stdout stays for results."""

import logging
import sys


def get(name: str) -> logging.Logger:
    """The logger of a module; silent until :func:`setup` or the host application configures logging."""
    return logging.getLogger(name)


def setup(level: int = logging.INFO) -> None:
    """Send the project's log lines to stderr. Called by the command line, never by the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("accessory")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
