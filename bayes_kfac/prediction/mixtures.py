"""Equal mixtures of torch distributions of one family, as one ``MixtureSameFamily``.

The components of distributions that are mixtures themselves are laid side by side, so that a mixture of mixtures is a
flat one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)

from bayes_kfac.errors import UsageError
from bayes_kfac.prediction.gaussian_lognormal import GaussianLogNormal
from bayes_kfac.prediction.poisson_lognormal import PoissonLogNormal
from bayes_kfac.prediction.quadrature import equal_log_weights, mixture

#: The parameters of each family that is known here, all of them in the full batch shape.
PARAMETERS: Mapping[type[Distribution], tuple[str, ...]] = {
    Categorical: ("logits",),
    GaussianLogNormal: ("loc", "scale_tril"),
    MultivariateNormal: ("loc", "scale_tril"),
    Normal: ("loc", "scale"),
    Poisson: ("rate",),
    PoissonLogNormal: ("loc", "scale_root"),
    StudentT: ("df", "loc", "scale"),
}

Join = Callable[[list[Tensor]], Tensor]


def equal_mixture(distributions: Sequence[Distribution]) -> MixtureSameFamily:
    """The mixture in which each distribution has the same weight.

    Args:
        distributions: Distributions of one family, maybe mixtures, with the same batch and event shapes.

    Returns:
        The mixture, of their shape.

    Raises:
        UsageError: If their families differ, or are not known here.
    """
    first = distributions[0]
    dim = len(first.batch_shape)
    if isinstance(first, MixtureSameFamily):  # their weights add up to 1 in each, and are normalised together
        side_by_side = _joined(distributions, partial(torch.cat, dim=dim))
        return MixtureSameFamily(side_by_side.mixture_distribution, side_by_side.component_distribution)
    components = _joined(distributions, partial(torch.stack, dim=dim))
    return mixture(components, equal_log_weights(len(distributions), first.mean))


def _joined(distributions: Sequence[Any], join: Join) -> Any:
    """The distribution whose parameters are those of all, joined along a batch dimension; that comes before events."""
    first = distributions[0]
    for other in distributions:
        if type(other) is not type(first):
            raise UsageError(
                f"The members' distributions are {type(first).__name__} and {type(other).__name__}: no mixture of one "
                "family. log_prob and the moments need no family."
            )
    if isinstance(first, Independent):
        base = _joined([each.base_dist for each in distributions], join)
        return Independent(base, first.reinterpreted_batch_ndims)
    if isinstance(first, MixtureSameFamily):
        weights = _joined([each.mixture_distribution for each in distributions], join)
        return MixtureSameFamily(weights, _joined([each.component_distribution for each in distributions], join))
    if type(first) not in PARAMETERS:
        raise UsageError(
            f"The members' distributions are {type(first).__name__}, whose mixture is not known. Allowed: "
            f"{', '.join(kind.__name__ for kind in PARAMETERS)}. log_prob and the moments need no family."
        )
    names = PARAMETERS[type(first)]
    return type(first)(**{name: join([getattr(each, name) for each in distributions]) for name in names})
