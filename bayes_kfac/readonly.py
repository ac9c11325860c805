"""A dictionary that is for reading: setting an item would go unchecked, or change nothing."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")


class ReadOnly(dict[str, Value]):
    """A dictionary whose items cannot be set; copies and pickles of it are plain ones.

    Example:
        >>> ReadOnly({"0": 1.0})["0"]
        1.0
    """

    def __setitem__(self, key: str, value: Value) -> NoReturn:
        """Refuse to set an item.

        Args:
            key: Its name.
            value: What it was to be.

        Raises:
            TypeError: Always.
        """
        raise TypeError("This dictionary does not support item assignment. Set the attribute as a whole.")

    def __reduce__(self) -> tuple[Any, ...]:
        """As a plain dictionary."""
        return dict, (dict(self),)
