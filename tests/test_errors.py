"""Errors: what they derive from, and the checks that raise them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayes_kfac as bk
from bayes_kfac import errors
from bayes_kfac.errors import (
    ArgumentError,
    BayesKfacError,
    BayesKfacWarning,
    check_choice,
    check_count,
    check_fraction,
    check_generator,
    check_positive,
    check_probability,
)
from bayes_kfac.likelihoods import Categorical, Gaussian
from tests.helpers import seeded
from tests.posteriors import random_posterior

BUILTINS = {
    "ArgumentError": ValueError,
    "TargetError": ValueError,
    "UnsupportedModelError": ValueError,
    "UsageError": RuntimeError,
    "NonFiniteError": ArithmeticError,
    "NotPositiveDefiniteError": ArithmeticError,
}


def test_every_error_is_listed_here() -> None:
    """A new error has to say, here too, which built-in it is."""
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BayesKfacError) and value is not BayesKfacError
    }
    assert defined == set(BUILTINS)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_errors_are_the_librarys_and_the_builtin(name: str, builtin: type[Exception]) -> None:
    """``except BayesKfacError`` and ``except ValueError`` both catch."""
    error = getattr(errors, name)
    assert issubclass(error, BayesKfacError)
    assert issubclass(error, builtin)
    for kind in (BayesKfacError, builtin):
        with pytest.raises(kind, match="some text"):
            raise error("some text")


def test_the_base_is_no_builtin() -> None:
    assert BayesKfacError.__bases__ == (Exception,)
    assert issubclass(BayesKfacWarning, UserWarning)


@pytest.mark.parametrize("value", [1, 0.5, 1e300, torch.tensor(2.0), torch.tensor([2.0])])
def test_positive_numbers_pass(value: Any) -> None:
    result = check_positive("lr", value)
    assert type(result) is float
    assert result == float(value)


@pytest.mark.parametrize(
    "value", [0, -1, -1e-30, math.nan, math.inf, -math.inf, None, "many", [1.0], torch.ones(2), torch.tensor(math.nan)]
)
def test_other_values_are_named(value: Any) -> None:
    """The message has the argument's name, its value and what is allowed."""
    with pytest.raises(ArgumentError) as caught:
        check_positive("lr", value)
    message = str(caught.value)
    assert message.startswith(f"lr={value!r} is")
    assert "Allowed: a finite number > 0." in message


def test_zero_where_it_is_allowed() -> None:
    assert check_positive("lr", 0, allow_zero=True) == 0.0
    with pytest.raises(ArgumentError, match="Allowed: a finite number >= 0"):
        check_positive("lr", -1, allow_zero=True)


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (7, 1), (0, 0), (10**12, 1)])
def test_counts_pass(value: int, minimum: int) -> None:
    assert check_count("epochs", value, minimum=minimum) is value


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_counts_of_numpy_pass_as_pythons(kind: type) -> None:
    count = check_count("epochs", kind(7))
    assert type(count) is int
    assert count == 7


@pytest.mark.parametrize("value", [0, -3, 1.0, 2.5, True, np.True_, np.int64(0), None, "3", torch.tensor(3)])
def test_other_counts_are_named(value: Any) -> None:
    """``True`` and ``1.0`` are no counts: they are a slip more often than not."""
    with pytest.raises(ArgumentError) as caught:
        check_count("epochs", value)
    assert str(caught.value) == f"epochs={value!r} is not allowed. Allowed: an integer >= 1."


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_fractions_pass(value: float) -> None:
    assert check_fraction("decay", value) == value


@pytest.mark.parametrize("value", [1, 1.5, -0.1, math.nan, None, "half"])
def test_other_fractions_are_named(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^decay=.*Allowed: "):
        check_fraction("decay", value)


@pytest.mark.parametrize("value", [0.9, np.float32(0.5), torch.tensor(0.25), torch.tensor([0.25])])
def test_probabilities_pass(value: Any) -> None:
    number = check_probability("level", value)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize(
    "value", [0, 1, -0.5, 95, math.nan, None, "wide", [0.1, 0.9], np.array([0.1, 0.9]), torch.tensor([0.1, 0.9])]
)
def test_other_probabilities_are_named(value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_probability("level", value)
    message = f"level={value!r} is out of range. Allowed: 0 < level < 1, one number such as 0.95."
    assert str(caught.value) == message


def test_choices() -> None:
    assert check_choice("method", "a", ("a", "b")) == "a"
    with pytest.raises(ArgumentError) as caught:
        check_choice("method", "c", ("a", "b"))
    assert str(caught.value) == "method='c' is unknown. Allowed: 'a', 'b'."


def test_generators_pass() -> None:
    generator = torch.Generator()
    assert check_generator(generator) is generator
    assert check_generator(None) is None


X, Y = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)


def posterior(likelihood: bk.likelihoods.Likelihood | None = None) -> bk.Posterior:
    return random_posterior(seeded(nn.Linear(3, 2)), likelihood or Gaussian(0.1))


@pytest.mark.parametrize(
    "call",
    [
        lambda seed: bk.fit(nn.Linear(3, 1).double(), Gaussian(0.1), [(X, Y)], num_data=2, epochs=1, generator=seed),
        lambda seed: bk.NoisyKFAC(nn.Linear(3, 1), Gaussian(0.1), num_data=2, generator=seed),
        lambda seed: bk.Laplace(nn.Linear(3, 1), Gaussian(0.1), generator=seed),
        lambda seed: posterior().sample(2, generator=seed),
        lambda seed: posterior().function_samples(X, 2, generator=seed),
        lambda seed: posterior().predict(X, "sampling", generator=seed),
        lambda seed: posterior(Categorical()).predict(X, generator=seed),
        lambda seed: posterior(Categorical()).predict(X, link="probit", generator=seed),
        lambda seed: bk.Mixture([posterior(), posterior()]).predict(X, generator=seed),
        lambda seed: bk.active.EPIG().look(posterior(), X, generator=seed),
        lambda seed: bk.active.Softmax(bk.active.ThompsonSampling("minimize")).select(X, 1, generator=seed),
    ],
)
def test_a_seed_is_no_generator(call: Callable[[int], object]) -> None:
    """Which is said where it comes in, also where nothing would be drawn."""
    with pytest.raises(ArgumentError, match=r"^generator=3 is not allowed.*torch\.Generator\(\)\.manual_seed\(3\)"):
        call(3)
