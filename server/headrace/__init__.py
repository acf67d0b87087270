"""Headrace: a high-performance model inference server."""

__version__ = "0.1.0"
