"""Logging: one logger a package, printed to stderr so that stdout stays for results."""

import logging
import sys
from typing import TextIO


def get(name: str) -> logging.Logger:
    """The logger of a module; silent until :func:`setup` or the host application configures logging."""
    return logging.getLogger(name)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: who redirects it later is heard too."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def setup(level: int = logging.INFO) -> None:
    """Send the project's log lines to stderr. Called by the command line, never by the library."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("accessory")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
