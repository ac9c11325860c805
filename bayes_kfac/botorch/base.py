"""What the surrogates share: the posterior over weights, transforms of inputs and outcomes, noise, and shapes.

Inputs are ``batch_shape x q x d``, outputs ``batch_shape x q x m``. Between the transforms everything is in the space
of the network: noise variances are, as everywhere in BoTorch, of the transformed outcomes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor, nn

from bayes_kfac.errors import ArgumentError, NonFiniteError, UsageError, check_count
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.linalg import all_finite
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction.forward import call, evaluating


class Surrogate(Model):
    """A posterior over the weights of a network as a BoTorch model.

    Args:
        posterior: The posterior, of a ``Gaussian`` likelihood. The network takes ``[batch, d]``.
        num_outputs: The outputs of the network for one input.
        input_transform: Applied to inputs before the network; such as ``Normalize``.
        outcome_transform: What the targets of the network were transformed by; such as ``Standardize``. Predictions are
            transformed back.

    Raises:
        ArgumentError: If the likelihood is not ``Gaussian``.
    """

    def __init__(
        self,
        posterior: Posterior,
        *,
        num_outputs: int = 1,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(posterior, Posterior):
            raise ArgumentError(
                f"posterior is a {type(posterior).__name__}. Allowed: a bayes_kfac.Posterior, as from bayes_kfac.fit() "
                "or Laplace(...).fit(...).posterior(). To go from data to a surrogate, use the classmethod fit()."
            )
        if not isinstance(posterior.likelihood, Gaussian):
            raise ArgumentError(
                f"The posterior's likelihood is {type(posterior.likelihood).__name__}. Allowed: Gaussian; a surrogate "
                "predicts real numbers."
            )
        self.weight_posterior = posterior
        self.likelihood = posterior.likelihood
        self._network_outputs = check_count("num_outputs", num_outputs)
        self._outputs = tuple(range(num_outputs))
        self._checked_columns: int | None = None
        # BoTorch asks with hasattr whether there are any
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        self.eval()

    @property
    def num_outputs(self) -> int:
        """The number of outputs."""
        return len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the model itself: empty, but for fantasies."""
        return torch.Size()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network, which inputs must have."""
        return next(value.dtype for value in self.weight_posterior.mean.values() if value.is_floating_point())

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the transforms. The weights are what they are, and the network is always evaluated.

        Args:
            mode: Whether transforms learn from what they see next.

        Returns:
            This object.
        """
        # Model.train() rewrites a GP's training inputs, and warns where there are none
        nn.Module.train(self, mode)
        return self

    def eval(self) -> Self:
        """Set the transforms to apply what they have learned.

        Returns:
            This object.
        """
        return self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Bring the transforms to where the network is, or refuse: weights and observations are shared, and stay."""
        now = next(value for value in self.weight_posterior.mean.values() if value.is_floating_point())
        new = fn(now)
        if (new.dtype, new.device) != (now.dtype, now.device):
            raise UsageError(
                f"A surrogate cannot be moved: its network is {now.dtype} on {now.device}, and would not come to "
                f"{new.dtype} on {new.device}. Make another from posterior.to(...), or fit one to data that are there."
            )
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    # what state_dict() and load_state_dict() call, of lists of models too
    def _save_to_state_dict(self, *args: Any) -> None:
        raise _no_state_dict()

    def _load_from_state_dict(self, *args: Any) -> None:
        raise _no_state_dict()

    def subset_output(self, idcs: list[int]) -> Self:
        """The same surrogate for some of the outputs; the others are not computed.

        Args:
            idcs: Their indices.

        Returns:
            A new surrogate, of the same weights.
        """
        chosen = self._chosen(idcs)
        subset = self._copy()
        subset._outputs = tuple(self._outputs[index] for index in chosen)
        if hasattr(self, "outcome_transform"):
            subset.outcome_transform = self.outcome_transform.subset_output(chosen)
        return subset

    @abstractmethod
    def _copy(self) -> Self:
        """A surrogate of its own with the same parts."""

    def _options(self) -> dict[str, Any]:
        """The keyword arguments that make such a surrogate."""
        return {
            "num_outputs": self._network_outputs,
            "input_transform": getattr(self, "input_transform", None),
            "outcome_transform": getattr(self, "outcome_transform", None),
        }

    def _chosen(self, output_indices: Sequence[int] | None) -> list[int]:
        """Indices of outputs, from 0; of all where none are given."""
        if output_indices is None:
            return list(range(self.num_outputs))
        if not output_indices or any(not -self.num_outputs <= index < self.num_outputs for index in output_indices):
            raise ArgumentError(
                f"output_indices={output_indices!r} is not allowed. Allowed: a list of integers from 0 to "
                f"{self.num_outputs - 1}."
            )
        return [index % self.num_outputs for index in output_indices]

    def _of_network(self, chosen: Sequence[int]) -> list[int]:
        """The network's own indices of chosen outputs."""
        return [self._outputs[index] for index in chosen]

    def _transformed(self, X: Tensor) -> Tensor:
        """Checked inputs as the network takes them, ``batch_shape x q x d``."""
        self.eval()
        check_tensor("X", X)
        if X.ndim < 2 or not X.numel():
            raise ArgumentError(
                f"X has shape {tuple(X.shape)}. Allowed: batch_shape x q x d, such as (q, d), with at least one point."
            )
        if X.dtype != self.dtype:
            raise ArgumentError(
                f"X is {X.dtype}, but the network's weights are {self.dtype}. Pass X.to({self.dtype}), or make the "
                f"surrogate from posterior.to({X.dtype}); BoTorch's optimizers work best in torch.float64."
            )
        transformed: Tensor = self.transform_inputs(X)
        self._check_network(transformed)
        return transformed

    def _check_network(self, X: Tensor) -> None:
        """See once for a number of columns that the network takes them, and has as many outputs as was said."""
        if self._checked_columns == X.shape[-1]:
            return
        weights = self.weight_posterior
        with evaluating(weights.model), torch.no_grad(), naming_columns(X):
            found = call(weights.model, weights.mean, X.flatten(0, -2)[:1]).numel()
        if found != self._network_outputs:
            raise ArgumentError(
                f"num_outputs={self._network_outputs}, but the network has {found} for one input. Pass "
                f"num_outputs={found}."
            )
        self._checked_columns = X.shape[-1]

    def _noise(
        self, given: bool | Tensor, like: Tensor, chosen: Sequence[int], name: str = "observation_noise"
    ) -> Tensor:
        """The variance of noise, shaped like outputs ``batch_shape x q x m`` or broadcasting to them."""
        if isinstance(given, Tensor):
            check_finite(name, given)
            if bool((given < 0).any()):
                raise ArgumentError(f"{name} holds {float(given.min()):g}. Allowed: variances, which are >= 0.")
            noise = given.to(like)
            if noise.ndim and noise.shape[-1] == self.num_outputs:
                noise = noise[..., list(chosen)]
        else:
            learned = self.likelihood.noise.variance().detach().to(like)
            noise = learned.broadcast_to((1, self._network_outputs))[:, self._of_network(chosen)]
        try:
            fits = torch.broadcast_shapes(noise.shape, like.shape[-2:])[-2:] == like.shape[-2:]
        except RuntimeError:
            fits = False
        if not fits:
            raise ArgumentError(
                f"{name} has shape {tuple(noise.shape)}. Allowed: variances that broadcast to batch_shape x "
                f"q x m, here {tuple(like.shape)}."
            )
        return noise

    def _outcome_transform_of(self, chosen: Sequence[int]) -> OutcomeTransform | None:
        transform = getattr(self, "outcome_transform", None)
        if transform is None or list(chosen) == list(range(self.num_outputs)):
            return transform
        return transform.subset_output(list(chosen))


def _no_state_dict() -> UsageError:
    return UsageError(
        "A surrogate has no state_dict: weights, their covariances and observations would not be in it. Save it whole: "
        "torch.save(surrogate, path), then torch.load(path, weights_only=False). One that was made from a posterior "
        "can be made again from the file of posterior.save(path)."
    )


def wants_noise(observation_noise: object) -> bool:
    """Whether noise is to be added, the likelihood's or variances that are given.

    Args:
        observation_noise: What was passed.

    Returns:
        Whether it is.

    Raises:
        ArgumentError: If it is neither a boolean nor a tensor.
    """
    if not isinstance(observation_noise, bool | Tensor):
        raise ArgumentError(
            f"observation_noise={observation_noise!r} is not allowed. Allowed: True for the likelihood's noise, False "
            "for none, or a tensor of variances."
        )
    return observation_noise is not False


def check_tensor(name: str, value: object) -> None:
    """See that an argument is a tensor.

    Args:
        name: The argument's name, for the message.
        value: The argument.

    Raises:
        ArgumentError: If not.
    """
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"{name} is a {type(value).__name__}. Allowed: a torch.Tensor, such as "
            f"torch.as_tensor(numpy.asarray({name}), dtype=torch.float64)."
        )


def check_finite(name: str, value: Tensor) -> None:
    """See that an argument is a tensor, and holds neither NaN nor infinity.

    Args:
        name: The argument's name, for the message.
        value: The argument.

    Raises:
        ArgumentError: If it is no tensor.
        NonFiniteError: If it holds any.
    """
    check_tensor(name, value)
    if not all_finite([value.detach()]):
        raise NonFiniteError(f"{name} holds NaN or infinity. Leave out the observations that do.")


@contextmanager
def naming_columns(X: Tensor) -> Iterator[None]:
    """Call a network, and say what it was called with if it fails.

    Args:
        X: The network's inputs, ``... x d``.

    Raises:
        ArgumentError: If the network raises a ``RuntimeError``, as where the number of columns is another.
    """
    try:
        yield
    except RuntimeError as error:
        raise ArgumentError(
            f"The network does not take inputs of d={X.shape[-1]} columns, which is what X has after any "
            f"input_transform: {error}"
        ) from error
