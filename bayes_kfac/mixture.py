"""A mixture of posteriors over the weights of one model, each with the same weight.

One Gaussian is one mode of the posterior. Trainings from other initialisations end in other modes, and a mixture of the
Gaussians around them knows of all: the mixture of Laplace approximations (Eschenhagen, Daxberger, Hennig & Kristiadi
2021, "Mixtures of Laplace approximations for improved post-hoc uncertainty in deep learning"), or a deep ensemble
(Lakshminarayanan, Pritzel & Blundell 2017) whose members know their own uncertainty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayes_kfac.errors import ArgumentError
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction import MEMORY_BUDGET, Prediction, concatenate, pool
from bayes_kfac.prediction.forward import parts_of


class Mixture:
    """Several posteriors over one model as one, each with the same weight.

    Members are trained from different initialisations, or on different orders of the data; each may have its own model
    object, or all the same, which serves as the function only. Structures, dampings, priors and learned noises may
    differ, likelihood and architecture may not. Every prediction costs as much as all of the members'.

    Args:
        members: The posteriors, at least one.

    Raises:
        ArgumentError: If there is none, or they are not all posteriors of one architecture, one dtype and one kind of
            likelihood.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = [(x, x.sin())]
        >>> def make_model(seed):
        ...     torch.manual_seed(seed)
        ...     return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> noise = bk.likelihoods.Gaussian(0.1)
        >>> mixture = bk.Mixture(
        ...     [bk.fit(make_model(seed), noise, loader, epochs=2, num_data=20, progress=False) for seed in range(3)]
        ... )
        >>> p = mixture.predict(x)
        >>> len(mixture), p.mean.shape, len(p.members)
        (3, torch.Size([20, 1]), 3)
        >>> bool((p.epistemic_variance > p.members[0].epistemic_variance).any())  # that between the members is in it
        True

        Of Laplace approximations, around networks that were trained in any way:

        >>> def laplace(model):
        ...     return bk.Laplace(model, noise).fit(loader, progress=False).posterior()
        >>> bk.Mixture([laplace(make_model(seed)) for seed in range(3)]).predict(x).log_prob(x.sin()).shape
        torch.Size([20])
    """

    def __init__(self, members: Sequence[Posterior]) -> None:
        if not isinstance(members, Iterable):
            raise ArgumentError(
                f"members={members!r} is not a list. Allowed: posteriors in a list, though it be of one."
            )
        #: The posteriors.
        self.members: tuple[Posterior, ...] = tuple(members)
        if not self.members:
            raise ArgumentError("members=[] is empty. Allowed: one posterior or more.")
        for index, member in enumerate(self.members):
            if not isinstance(member, Posterior):
                raise ArgumentError(
                    f"members[{index}] is a {type(member).__name__}. Allowed: posteriors, such as bk.fit(...) and "
                    "bk.Laplace(...).fit(...).posterior() return."
                )
            _check_alike(index, member, self.members[0])

    def __len__(self) -> int:
        """The number of members."""
        return len(self.members)

    def __repr__(self) -> str:
        """The members, in their order."""
        return f"Mixture({list(self.members)!r})"

    def predict(
        self,
        inputs: Any,
        method: str | None = None,
        *,
        link: str | None = None,
        output_covariance: str = "full",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        memory_budget: int = MEMORY_BUDGET,
        progress: bool = True,
    ) -> Prediction:
        """The equal mixture of the members' predictive distributions at some inputs.

        Args:
            inputs: As in :meth:`Posterior.predict`. Of a ``DataLoader`` every batch goes to all members before the
                next, so that one that shuffles will do; but only its own order tells which result is whose.
            method: As in :meth:`Posterior.predict`.
            link: As in :meth:`Posterior.predict`.
            output_covariance: As in :meth:`Posterior.predict`.
            num_samples: Draws of each member.
            generator: The source of randomness, for one member after another.
            memory_budget: As in :meth:`Posterior.predict`; members predict one after another.
            progress: Whether to show a progress bar over a ``DataLoader``.

        Returns:
            The pooled prediction, see :mod:`bayes_kfac.prediction.pooled`; of a mixture of one, its member's.

        Raises:
            ArgumentError: If an argument is unknown, or one that does not go with the method or the likelihood.

        Example:
            >>> import bayes_kfac as bk, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(2, 3), bk.likelihoods.Categorical())
            >>> posterior = laplace.fit([(torch.eye(2), torch.tensor([0, 2]))], progress=False).posterior()
            >>> p = bk.Mixture([posterior, posterior]).predict(torch.eye(2), num_samples=10)
            >>> p.probs.shape, p.sampled_probs.shape
            (torch.Size([2, 3]), torch.Size([20, 2, 3]))
        """
        takes_draws = method == "sampling" and link is None  # a link is refused below
        draws = [
            member.sample(num_samples, generator=generator) if takes_draws else None  # once for all batches
            for member in self.members
        ]

        def predict(part: Any) -> Prediction:
            return pool(
                [
                    member.predict(
                        part,
                        method,
                        link=link,
                        output_covariance=output_covariance,
                        num_samples=num_samples,
                        draws=own,
                        generator=generator,
                        memory_budget=memory_budget,
                    )
                    for member, own in zip(self.members, draws, strict=True)
                ]
            )

        if isinstance(inputs, DataLoader):
            return concatenate([predict(part) for part in parts_of(inputs, self.device, progress)])
        return predict(inputs)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.members[0].device

    def to(self, target: torch.device | torch.dtype | str) -> Mixture:
        """The same mixture on another device or in another dtype; the models are moved too, as in ``nn.Module.to``.

        Args:
            target: A device or a floating-point dtype.

        Returns:
            A new mixture.
        """
        return Mixture([member.to(target) for member in self.members])

    def with_likelihood(self, likelihood: Likelihood) -> Mixture:
        """The same members, whose predictions all have another likelihood; see :meth:`Posterior.with_likelihood`.

        Args:
            likelihood: What the model's output means, of the kind that it was; copied.

        Returns:
            A new mixture.
        """
        return Mixture([member.with_likelihood(likelihood) for member in self.members])

    def save(self, path: str | Path) -> None:
        """Write all members to one safetensors file: tensors, numbers and strings only, no code.

        Args:
            path: The file.
        """
        from bayes_kfac.serialization import save_members

        save_members(self.members, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, likelihood: Likelihood | None = None) -> Mixture:
        """Read a mixture from a file.

        Args:
            path: The file.
            model: A model of the same architecture, which all members share; its own weights are neither used nor
                changed.
            likelihood: As in :meth:`Posterior.load`.

        Returns:
            The mixture.

        Example:
            >>> import bayes_kfac as bk, tempfile, torch
            >>> laplace = bk.Laplace(torch.nn.Linear(2, 1), bk.likelihoods.Gaussian(0.5))
            >>> posterior = laplace.fit([(torch.eye(2), torch.ones(2, 1))], progress=False).posterior()
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     bk.Mixture([posterior, posterior]).save(f"{folder}/mixture.safetensors")
            ...     again = bk.Mixture.load(f"{folder}/mixture.safetensors", torch.nn.Linear(2, 1))
            >>> len(again), torch.equal(again.members[1].mean["weight"], posterior.mean["weight"])
            (2, True)
        """
        from bayes_kfac.serialization import load_members

        return cls(load_members(Posterior, Path(path), model, likelihood))


def _check_alike(index: int, member: Posterior, first: Posterior) -> None:
    """Refuse a member that is no posterior over the same function, or that is somewhere else."""
    if type(member.likelihood) is not type(first.likelihood):
        raise ArgumentError(
            f"members[{index}] has a {type(member.likelihood).__name__} likelihood and members[0] a "
            f"{type(first.likelihood).__name__}. Allowed: posteriors of one kind of likelihood."
        )
    own, others = _shapes(member.mean), _shapes(first.mean)
    differing = sorted(name for name in own.keys() | others.keys() if own.get(name) != others.get(name))
    if differing:
        details = "".join(
            f"\n  {name}: members[{index}] {own.get(name)}, members[0] {others.get(name)}" for name in differing[:8]
        )
        raise ArgumentError(f"members[{index}] is over another architecture than members[0]:{details}")
    for name, value in member.mean.items():
        if value.dtype != first.mean[name].dtype:
            raise ArgumentError(
                f"members[{index}] has {name} in {value.dtype} and members[0] in {first.mean[name].dtype}. Allowed: "
                "posteriors in one dtype. Move them with .to(dtype)."
            )
    if member.device != first.device:
        raise ArgumentError(
            f"members[{index}] is on {member.device} and members[0] on {first.device}. Allowed: posteriors on one "
            "device. Move them with .to(device)."
        )


def _shapes(mean: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in mean.items()}
