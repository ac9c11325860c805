"""Errors and warnings of the library, and the checks that raise them.

Every error names the argument, the value it had, what is allowed and what to do. All of them derive from
:class:`BayesKfacError` and from the built-in exception a caller would expect.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

import torch


class BayesKfacError(Exception):
    """Base class of every error that the library raises on purpose."""


class ArgumentError(BayesKfacError, ValueError):
    """An argument is outside what is allowed."""


class TargetError(BayesKfacError, ValueError):
    """Outputs and targets do not fit each other or the likelihood."""


class UnsupportedModelError(BayesKfacError, ValueError):
    """The model has parameters that no curvature block covers."""


class UsageError(BayesKfacError, RuntimeError):
    """Calls came in an order that cannot work, such as a step without a sample."""


class NonFiniteError(BayesKfacError, ArithmeticError):
    """Data, gradients or statistics hold NaN or infinity."""


class NotPositiveDefiniteError(BayesKfacError, ArithmeticError):
    """A factor could not be factorised in any precision."""


class BayesKfacWarning(UserWarning):
    """Something is legal but probably not what is wanted."""


def check_positive(name: str, value: SupportsFloat, *, allow_zero: bool = False) -> float:
    """Return ``value`` as a float, or say why it cannot serve.

    Args:
        name: The argument's name, for the message.
        value: A number, or a tensor of one element.
        allow_zero: Whether 0 is allowed too.

    Returns:
        The value as a Python float.

    Raises:
        ArgumentError: If the value is no number, not finite, negative, or zero where zero is not allowed.
    """
    allowed = "a finite number >= 0" if allow_zero else "a finite number > 0"
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}={value!r} is not a number. Allowed: {allowed}.") from error
    if not math.isfinite(number) or number < 0 or (number == 0 and not allow_zero):
        raise ArgumentError(f"{name}={value!r} is out of range. Allowed: {allowed}.")
    return number


def check_count(name: str, value: SupportsIndex, *, minimum: int = 1) -> int:
    """Return ``value`` as an ``int`` if it is an integer, maybe one of numpy's, of at least ``minimum``.

    Args:
        name: The argument's name, for the message.
        value: The value to check.
        minimum: The smallest allowed integer.

    Returns:
        The value as a Python integer.

    Raises:
        ArgumentError: If the value is not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ArgumentError(f"{name}={value!r} is not allowed. Allowed: an integer >= {minimum}.")
    return int(value)


def check_fraction(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a float in ``[0, 1)``.

    Args:
        name: The argument's name, for the message.
        value: The value to check.

    Returns:
        The value as a Python float.

    Raises:
        ArgumentError: If the value is outside ``[0, 1)``.
    """
    number = check_positive(name, value, allow_zero=True)
    if number >= 1:
        raise ArgumentError(f"{name}={value!r} is out of range. Allowed: 0 <= {name} < 1.")
    return number


def check_probability(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a float in ``(0, 1)``.

    Args:
        name: The argument's name, for the message.
        value: A number, or a tensor of one element.

    Returns:
        The value as a Python float.

    Raises:
        ArgumentError: If the value is no number, or outside ``(0, 1)``.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < 1:
        raise ArgumentError(f"{name}={value!r} is out of range. Allowed: 0 < {name} < 1, one number such as 0.95.")
    return number


def check_choice(name: str, value: str, allowed: Collection[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Args:
        name: The argument's name, for the message.
        value: The value to check.
        allowed: The allowed values.

    Returns:
        The value.

    Raises:
        ArgumentError: If the value is not among them.
    """
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is unknown. Allowed: {', '.join(map(repr, allowed))}.")
    return value


def check_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Return ``generator`` if it is a source of randomness, or ``None`` for torch's own.

    Args:
        generator: What was passed as ``generator=``.

    Returns:
        The generator.

    Raises:
        ArgumentError: If it is anything else, such as a seed.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(
            f"generator={generator!r} is not allowed. Allowed: a torch.Generator, or None for torch's own. To start "
            "from a seed, pass torch.Generator().manual_seed(3)."
        )
    return generator


def check_file(name: str, path: Path) -> Path:
    """Return a path where a file can be written, or raise.

    Args:
        name: The argument's name, for the message.
        path: The path.

    Returns:
        The path.

    Raises:
        ArgumentError: If it is a folder, or in a folder that does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ArgumentError(f"{name}={str(path)!r} {what}. Allowed: a file in a folder that exists.")
    return path
