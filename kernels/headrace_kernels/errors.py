"""What goes wrong outside the kernels themselves."""

from __future__ import annotations


class KernelsUnavailable(Exception):
    """The device kernels cannot be used here. Says which package, library or device is missing."""


__all__ = ["KernelsUnavailable"]
