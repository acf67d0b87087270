"""The page for people: its files, and the state it shows."""

from headrace.http.dashboard.page import Dashboard

__all__ = ["Dashboard"]
