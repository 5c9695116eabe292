"""A check that estimators of every kind and the objectives share."""

from typing import Any


def check_count(number: Any, name: str, *, caller: str) -> None:
    """Refuse what is not a positive integer."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(
            f"{caller} needs {name} as a positive integer, got {number!r} of type "
            f"{type(number).__name__}."
        )
    if number < 1:
        raise ValueError(f"{caller} needs {name} >= 1, got {number}.")
