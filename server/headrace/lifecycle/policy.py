"""Which versions should be live. Pure functions of what is known."""

from __future__ import annotations

from collections.abc import Collection

from headrace.errors import ConfigError


def select_versions(available: Collection[int], policy: str) -> list[int]:
    """The versions that a policy wants, ascending: 'latest:N', 'all', or numbers separated by commas (those that exist).

    Raises ConfigError for a policy of any other form.
    """
    if policy == "all":
        return sorted(available)
    kind, _, count = policy.partition(":")
    if kind == "latest" and _is_number(count) and int(count) > 0:
        return sorted(available)[-int(count) :]
    numbers = [part.strip() for part in policy.split(",")]
    if all(_is_number(number) for number in numbers):
        return sorted({int(number) for number in numbers} & set(available))
    raise ConfigError(f"version_policy: expected 'latest:N', 'all' or version numbers such as '1,3', got {policy!r}")


def _is_number(text: str) -> bool:
    """str.isdigit alone is true of '²', which int() refuses."""
    return text.isascii() and text.isdigit()
