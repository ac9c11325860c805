"""Result objects: what a prediction knows, and how a likelihood chooses its kind of result.

All of them split the variance of a new target: ``variance = aleatoric_variance + epistemic_variance``, always. The
first is the expected noise of the target given the weights, the second the variance of its mean over the weights. The
first dimension of everything is the batch.

A result class is a frozen dataclass whose fields say along which dimension they hold the batch, with
``field(metadata=batch_dim(...))``; the others are the same for every batch. That is all :func:`concatenate` needs. With
``repr=False`` it is shown as shape and origin, not as all of its numbers.

A likelihood gets its results by one line each of ``from_gaussian.register`` and ``from_outputs.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.provenance import Provenance

P = TypeVar("P", bound="Prediction")


def batch_dim(dim: int) -> Mapping[str, int]:
    """The metadata of a dataclass field that holds the batch along ``dim``.

    It is a tensor, a :class:`GaussianOutput`, or a tuple of predictions, each of which knows its own dimensions.

    Args:
        dim: The dimension.

    Returns:
        The metadata.
    """
    return {"batch_dim": dim}


@dataclass(frozen=True)
class Source:
    """Where a prediction came from.

    Attributes:
        method: ``"linearized"`` or ``"sampling"``.
        num_samples: The number of draws, or ``None`` where the result is in closed form; of a mixture, for each member.
        posterior: How the posterior was made; of a mixture, each of its members.
        link: How class probabilities came from a Gaussian of logits; ``None`` for regression and for sampled weights.
    """

    method: str
    num_samples: int | None
    posterior: Provenance | tuple[Provenance, ...]
    link: str | None = None


class Prediction(ABC):
    """The predictive distribution of targets.

    Attributes:
        source: Where the prediction came from.
    """

    source: Source

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.mean)

    def __repr__(self) -> str:
        """The kind, the shape of the mean, and where it came from; the numbers are in the attributes."""
        return f"{type(self).__name__}(mean of shape {tuple(self.mean.shape)}, {self.source!r})"

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean of the target, ``[batch, ...]``; class probabilities in a classification."""

    @property
    @abstractmethod
    def epistemic_variance(self) -> Tensor:
        """The variance of the target's mean over the weights, shaped like :attr:`mean`."""

    @property
    @abstractmethod
    def aleatoric_variance(self) -> Tensor:
        """The expected variance of the target given the weights, shaped like :attr:`mean`."""

    @property
    @abstractmethod
    def distribution(self) -> Distribution:
        """The predictive distribution of the target, as a torch distribution."""

    @property
    def variance(self) -> Tensor:
        """The variance of the target: aleatoric plus epistemic."""
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def stddev(self) -> Tensor:
        """The standard deviation of the target, noise included."""
        return self.variance.sqrt()

    @abstractmethod
    def log_prob(self, target: Tensor) -> Tensor:
        """The log-density of each target, ``[batch]``, in nats; dimensions of one example are summed."""


@singledispatch
def from_gaussian(
    likelihood: Likelihood,
    output: GaussianOutput,
    source: Source,
    *,
    link: str | None,
    num_samples: int,
    generator: torch.Generator | None,
) -> Prediction:
    """The prediction for a Gaussian model output.

    Args:
        likelihood: What the output means.
        output: The output's mean, and its covariance or variances.
        source: Where it came from.
        link: How class probabilities come from the output, one of :data:`bayes_kfac.prediction.links.LINKS`; ``None``
            for ``"mc"`` there, and for likelihoods that need no link.
        num_samples: Draws of the output for ``link="mc"``.
        generator: The source of randomness for them.

    Raises:
        ArgumentError: If the likelihood has no such result, or no such link.
    """
    raise ArgumentError(f"{type(likelihood).__name__} has no prediction: register it with from_gaussian.register.")


@singledispatch
def from_outputs(likelihood: Likelihood, outputs: Tensor, source: Source) -> Prediction:
    """The prediction for draws of the model's output.

    Args:
        likelihood: What the output means.
        outputs: ``[num_samples, batch, ...]``.
        source: Where they came from.

    Raises:
        ArgumentError: If the likelihood has no such result.
    """
    raise ArgumentError(f"{type(likelihood).__name__} has no prediction: register it with from_outputs.register.")


def refuse_link(likelihood: Likelihood, link: str | None) -> None:
    """Refuse a link where there is none to choose.

    Args:
        likelihood: What the output means.
        link: What was asked for.

    Raises:
        ArgumentError: If anything was.
    """
    if link is not None:
        raise ArgumentError(
            f"link={link!r} is for class probabilities, but the prediction of a {type(likelihood).__name__} likelihood "
            "is in closed form. Allowed: None. Leave link= out."
        )


def concatenate(predictions: Iterable[P]) -> P:
    """One prediction for the examples of several, in their order: the results of a loader's batches, say.

    Every example keeps its own result. Draws with the same index are the same function in all of the batches only if
    all were made from the same ``draws=``.

    Args:
        predictions: At least one, all of one kind, from one posterior, by one method.

    Returns:
        The prediction for all examples.

    Raises:
        ArgumentError: If there is none, or they differ in more than the batch.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> laplace = bk.Laplace(torch.nn.Linear(1, 1), bk.likelihoods.Gaussian(1.0))
        >>> posterior = laplace.fit([(torch.ones(3, 1), torch.ones(3, 1))], progress=False).posterior()
        >>> len(bk.prediction.concatenate([posterior.predict(torch.ones(2, 1)), posterior.predict(torch.ones(5, 1))]))
        7
    """
    predictions = list(predictions)
    kind = common_kind(predictions)
    joined = {}
    for own in fields(kind):  # type: ignore[arg-type]  # each kind is a dataclass; their base has no fields
        values = [getattr(prediction, own.name) for prediction in predictions]
        dim = own.metadata.get("batch_dim")
        joined[own.name] = _shared(own.name, values) if dim is None else _joined(own.name, values, dim)
    return kind(**joined)


def common_kind(predictions: Sequence[P]) -> type[P]:
    """The one kind of some predictions.

    Args:
        predictions: The predictions.

    Returns:
        Their class.

    Raises:
        ArgumentError: If there is none, or they are of several kinds.
    """
    if not predictions:
        raise ArgumentError("predictions=[] is empty. Allowed: one prediction or more.")
    kind = type(predictions[0])
    for index, prediction in enumerate(predictions):
        if type(prediction) is not kind:
            raise ArgumentError(
                f"predictions[{index}] is a {type(prediction).__name__} and predictions[0] a {kind.__name__}. Allowed: "
                "predictions of one kind. Take those of each kind by themselves."
            )
    return kind


def _joined(name: str, values: Sequence[Any], dim: int) -> Any:
    """Tensors along their batch dimension; Gaussian outputs field by field, and members of mixtures one by one."""
    if isinstance(values[0], tuple):
        _shared(f"number of {name}", [len(value) for value in values])
        return tuple(concatenate(own) for own in zip(*values, strict=True))
    if isinstance(values[0], GaussianOutput):
        names = [own.name for own in fields(GaussianOutput)]
        return GaussianOutput(*(_joined(f"{name}.{each}", [getattr(v, each) for v in values], dim) for each in names))
    shapes = [tuple(value.shape) for value in values]
    for index, shape in enumerate(shapes):
        if shape[:dim] + shape[dim + 1 :] != shapes[0][:dim] + shapes[0][dim + 1 :]:
            raise ArgumentError(
                f"predictions[{index}].{name} has shape {shape} and predictions[0].{name} {shapes[0]}. Allowed: shapes "
                f"that differ in the batch, dimension {dim}, only. Predict with the same num_samples and outputs."
            )
    return torch.cat(list(values), dim)


def _shared(name: str, values: Sequence[Any]) -> Any:
    """The value that all of them have."""
    for index, value in enumerate(values):
        if not _same(values[0], value):
            raise ArgumentError(
                f"predictions[{index}].{name}={_shown(value)} differs from predictions[0].{name}={_shown(values[0])}. "
                "Allowed: predictions of one posterior by one method, link and number of draws. Concatenate the others "
                "apart."
            )
    return values[0]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, nn.Module) and type(left) is type(
        right
    ):  # modules compare by identity, a loaded one is another
        own, other = left.state_dict(), right.state_dict()
        return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    return bool(left == right)


def _shown(value: Any) -> str:
    if isinstance(value, nn.Module):  # its own representation leaves out its state
        return f"{type(value).__name__}({ {name: tensor.tolist() for name, tensor in value.state_dict().items()} })"
    return repr(value)
