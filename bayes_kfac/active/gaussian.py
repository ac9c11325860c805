"""Information about a regression, in closed form: BALD, BatchBALD and EPIG of the linearised model with Gaussian noise.

The targets at all inputs are jointly Gaussian there, with covariance ``J P⁻¹ Jᵀ`` between examples and the noise's
variance on the diagonal. Everything is in units of the noise's standard deviation, so that a target's covariance is
``I + C``, where ``C`` is the ``[outputs, outputs]`` covariance of its mean; blocks are ``[n, outputs, outputs]``,
information is in nats.

A pick conditions the Gaussian, as a step of a partial Cholesky factorisation does: with ``R Rᵀ = I + C_jj`` of the
picked target, ``V_i = C_ij R⁻ᵀ`` is a new column of the factor and ``C_ii ← C_ii − V_i V_iᵀ``. ``C_ij`` itself is the
prior covariance, one pass over the pool, less the products of the earlier columns. After ``b`` picks of ``n``
candidates ``n b`` blocks of the kernel were computed, and never the ``n × n`` matrix.

The state is in float64 whatever the model's dtype: a difference of two large numbers is what is wanted, and the noise
is often a thousandth of the prior's variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from bayes_kfac.active.base import Gains
from bayes_kfac.active.predictors import check_order
from bayes_kfac.batches import inputs_of
from bayes_kfac.errors import ArgumentError, NonFiniteError, UsageError, check_count
from bayes_kfac.likelihoods import Gaussian
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction import MEMORY_BUDGET

#: How far the variance of a picked candidate may be from the one it had at first, relative: more than a model's own
#: rounding in 16 bits, and less than between two candidates.
SAME = 0.05
#: What is no variance, in units of the noise's.
ROUNDING = 1e-6
#: Covariances of candidates with targets that are formed at a time take a quarter of the memory budget, since others of
#: their size are made on the way. They are worked on in pieces of so many bytes: on a CPU what the caches like.
CPU_PIECE_BYTES = 1 << 20
ACCELERATOR_PIECE_BYTES = 1 << 28


class GaussianGains(Gains):
    """Information about the weights: closed-form BALD, and BatchBALD for each further pick.

    The score of a candidate is ``I(y; w | picked targets) = ½ log det(I + C)``, where ``C`` is the covariance of its
    mean given the targets of the picked candidates, in units of the noise. Scores of one pick after another add up to
    ``½ log det(I + K)`` of the batch (Houlsby et al. 2011; Kirsch et al. 2019, in closed form), a monotone submodular
    function: they only fall.

    Args:
        posterior: A posterior of a regression, ``likelihoods.Gaussian``.
        inputs: The candidates, as in :meth:`Posterior.predict`; a ``DataLoader`` is gone through once at first and
            once or twice for each pick, and has to yield the same examples in the same order every time.
        memory_budget: Bytes that a pass over the candidates may take beside the state, which is
            ``n · outputs² · (1 + picks)`` numbers.

    Raises:
        ArgumentError: If the likelihood is another, a loader shuffles, or there are no candidates.
        NonFiniteError: If a candidate's variance is not finite.
    """

    def __init__(self, posterior: Posterior, inputs: Any, *, memory_budget: int = MEMORY_BUDGET) -> None:
        self._pool = _Targets("inputs", posterior, inputs, check_count("memory_budget", memory_budget))

    @property
    def scores(self) -> Tensor:
        """``I(y; w | picked)`` of each candidate, ``[n]``, in nats; of a picked one, what a second label would add."""
        return self._pool.half_logdet

    def add(self, index: int) -> None:
        """Pick a candidate: one pass over all of them.

        Args:
            index: Which.

        Raises:
            ArgumentError: If there is no such candidate.
            UsageError: If the candidates are not what they were.
        """
        self._pool.condition(self._pool.column(self._pool.pick(index)))


class GaussianPredictiveGains(Gains):
    """Information about predictions: closed-form EPIG, the expected predictive information gain.

    The score of a candidate is the mean over target inputs ``x*`` of
    ``I(y; y* | picked) = ½ log(det C_yy · det C_** / det C_joint)``, with noise in both targets (Bickford Smith et al.
    2023, in closed form). Given targets that are like the inputs of later use, it asks for what helps there,
    where :class:`GaussianGains` asks for what is not known anywhere. Scores of one pick after another add up to the
    mean of ``I(batch; y*)``, which is monotone but not submodular.

    Args:
        posterior: A posterior of a regression, ``likelihoods.Gaussian``.
        inputs: The candidates, as in :class:`GaussianGains`.
        targets: The inputs at which predictions will be wanted, in the same forms.
        memory_budget: Bytes that a pass may take beside the state. Where the ``n · m · outputs²`` covariances between
            candidates and targets fit, they are computed once; else anew in pieces after each pick.

    Raises:
        ArgumentError: As for :class:`GaussianGains`.
        NonFiniteError: As there.
    """

    def __init__(self, posterior: Posterior, inputs: Any, targets: Any, *, memory_budget: int = MEMORY_BUDGET) -> None:
        self._pool = _Targets("inputs", posterior, inputs, check_count("memory_budget", memory_budget))
        self._targets = _Targets("targets", posterior, targets, memory_budget)
        row = self._targets.covariance.nbytes  # as large as the covariances of one candidate with all targets
        fits = len(self._pool.covariance) * row <= memory_budget
        self._step = max(1, memory_budget // (4 * row))
        piece = CPU_PIECE_BYTES if self._pool.covariance.device.type == "cpu" else ACCELERATOR_PIECE_BYTES
        self._piece = max(1, min(self._step, piece // row))
        self._cross = torch.cat([prior for _, prior in self._prior_cross()]) if fits else None

    @cached_property
    def scores(self) -> Tensor:
        """The mean of ``I(y; y* | picked)`` over targets of each candidate, ``[n]``, in nats."""
        S, noisy = self._pool.noisy, self._targets.noisy
        root = torch.linalg.inv(_root(noisy)).mT  # its product with its transpose is the inverse
        remaining = []
        for rows, cross in self._conditional_cross():
            half = torch.einsum("nmcd,mde->nmce", cross, root)
            # the covariance of y given y*: what the logarithm of its determinant falls short of that of S is known
            given = S[rows].unsqueeze(1) - torch.einsum("nmce,nmde->nmcd", half, half)
            remaining.append(_half_logdet(given).mean(1))
        return (_half_logdet(S) - torch.cat(remaining)).clamp(min=0)  # negative by rounding only

    def add(self, index: int) -> None:
        """Pick a candidate: one pass over candidates and targets.

        Args:
            index: Which.

        Raises:
            ArgumentError: If there is no such candidate.
            UsageError: If the candidates are not what they were.
        """
        pick = self._pool.pick(index)
        mine, theirs = self._pool.column(pick), self._targets.column(pick)
        self._pool.condition(mine)
        self._targets.condition(theirs)
        if self._cross is not None:
            for rows in self._pieces(0, len(mine)):
                self._cross[rows] -= _products(mine[rows], theirs)
        self.__dict__.pop("scores", None)

    def _conditional_cross(self) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the pool, and their covariances with all targets given the picked ones."""
        for start, prior in self._prior_cross() if self._cross is None else [(0, self._cross)]:
            for rows in self._pieces(start, start + len(prior)):
                cross = prior[rows.start - start : rows.stop - start]
                if self._cross is None:
                    cross = cross - _products(self._pool.factors[rows], self._targets.factors)
                yield rows, cross

    def _prior_cross(self) -> Iterator[tuple[int, Tensor]]:
        """Where a part of the pool starts, and its covariances with all targets when nothing was picked."""
        start = 0
        for part in self._pool.batches(self._step):
            prior = torch.cat([self._pool.kernel(part, other) for other in self._targets.batches()], dim=1)
            yield start, prior
            start += len(prior)

    def _pieces(self, start: int, stop: int) -> Iterator[slice]:
        return (slice(at, min(at + self._piece, stop)) for at in range(start, stop, self._piece))


@dataclass(frozen=True)
class _Pick:
    """A picked candidate.

    Attributes:
        inputs: The model's input, a batch of one.
        factors: Its columns of the factor so far, ``[outputs, outputs · picks]``.
        root: ``R`` with ``R Rᵀ = I + C``, ``[outputs, outputs]``.
    """

    inputs: Any
    factors: Tensor
    root: Tensor


class _Targets:
    """The targets at some inputs given those picked, in units of the noise.

    Attributes:
        covariance: ``C`` of each, ``[n, outputs, outputs]``.
        factors: The factor's rows, ``[n, outputs, outputs · picks]``.
    """

    def __init__(self, name: str, posterior: Posterior, inputs: Any, memory_budget: int) -> None:
        if not isinstance(posterior, Posterior):
            raise ArgumentError(
                f"posterior is a {type(posterior).__name__}. Allowed: a Posterior, such as bk.fit(...) returns, or "
                "Laplace.posterior()."
            )
        if not isinstance(posterior.likelihood, Gaussian):
            raise ArgumentError(
                f"The posterior's likelihood is {type(posterior.likelihood).__name__}. Allowed: Gaussian, for which "
                "information is in closed form. Use an acquisition on draws."
            )
        check_order(name, inputs)
        self._name, self._posterior, self._inputs, self._memory_budget = name, posterior, inputs, memory_budget
        covariances = []
        self._sizes: list[int] = []
        with torch.no_grad():
            for batch in self.batches():
                output = posterior.output(batch, memory_budget=memory_budget)
                self._noise = _noise_scale(posterior.likelihood, output.mean)
                covariances.append(self._in_units_of_noise(output.covariance))
                self._sizes.append(len(output.mean))
        if not covariances:
            raise ArgumentError(f"{name} yields no batch. Pass at least one example.")
        self.covariance = torch.cat(covariances)
        broken = (~torch.isfinite(self.covariance)).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:
            raise NonFiniteError(
                f"The variance of {len(broken)} of {len(self.covariance)} examples of {name} is not finite, first at "
                f"index {broken[0]}. Are their inputs?"
            )
        self.factors = self.covariance.new_zeros(*self.covariance.shape[:2], 0)

    @property
    def noisy(self) -> Tensor:
        """``I + C``, ``[n, outputs, outputs]``."""
        return self.covariance + torch.eye(
            self.covariance.shape[-1], dtype=torch.float64, device=self.covariance.device
        )

    @property
    def half_logdet(self) -> Tensor:
        """``½ log det(I + C)``, ``[n]``."""
        return _half_logdet(self.noisy)

    def kernel(self, inputs: Any, others: Any) -> Tensor:
        """Prior covariances between examples, ``[n, m, outputs, outputs]``."""
        with torch.no_grad():
            covariance = self._posterior.function_covariance(inputs, others, memory_budget=self._memory_budget)
        return self._in_units_of_noise(covariance)

    def pick(self, index: int) -> _Pick:
        """What conditions on an example's target."""
        size = len(self.covariance)
        if check_count("index", index, minimum=0) >= size:
            raise ArgumentError(f"index={index!r} is not one of {size} candidates. Allowed: 0 to {size - 1}.")
        inputs = self._example(index)
        before = float(self.covariance[index].trace() + self.factors[index].square().sum())
        now = float(self.kernel(inputs, inputs)[0, 0].trace())
        if abs(now - before) > SAME * before + ROUNDING:
            raise UsageError(
                f"Candidate {index} of {self._name} had the variance {before:.6g} among the others and has {now:.6g} "
                "by itself, in units of the noise. Either a loader yields other examples in each pass (a sampler that "
                "draws, random transforms), or the model lets the examples of a batch depend on each other; neither "
                "can be conditioned on."
            )
        return _Pick(inputs, self.factors[index], _root(self.noisy[index]))

    def column(self, pick: _Pick) -> Tensor:
        """The factor's columns of a pick, ``[n, outputs, outputs]``: one pass."""
        prior = torch.cat([self.kernel(batch, pick.inputs)[:, 0] for batch in self.batches()])
        column = prior - self.factors @ pick.factors.mT
        return torch.linalg.solve_triangular(pick.root.mT, column, upper=True, left=False)

    def condition(self, column: Tensor) -> None:
        """Take in a pick's columns of the factor."""
        self.covariance = self.covariance - column @ column.mT
        self.factors = torch.cat([self.factors, column], dim=-1)

    def batches(self, step: int | None = None) -> Iterator[Any]:
        """The inputs as they came, or in pieces of at most so many examples."""
        whole = self._inputs if isinstance(self._inputs, DataLoader) else [self._inputs]
        for index, batch in enumerate(whole):
            inputs = inputs_of(batch, self._posterior.device) if isinstance(self._inputs, DataLoader) else batch
            size = self._sizes[index] if index < len(self._sizes) else 0  # not known in the first pass
            if step is None or step >= size:
                yield inputs
            else:
                yield from (_some(inputs, slice(start, start + step)) for start in range(0, size, step))

    def _example(self, index: int) -> Any:
        for size, batch in zip(self._sizes, self.batches(), strict=False):
            if index < size:
                return _some(batch, slice(index, index + 1))
            index -= size
        raise UsageError(f"{self._name} yields fewer examples than in its first pass.")

    def _in_units_of_noise(self, covariance: Tensor) -> Tensor:
        return covariance.double() / (self._noise[:, None] * self._noise)


def _noise_scale(likelihood: Gaussian, mean: Tensor) -> Tensor:
    """The standard deviation of each output's noise, ``[outputs]``: that of the predictions' aleatoric variance."""
    return likelihood.noise.variance().detach().to(mean).expand_as(mean[:1]).flatten().double().sqrt()


def _columns(covariance: Tensor) -> Iterator[Tensor]:
    """The columns of the Cholesky factor ``R`` of ``S ≥ I``, each from its diagonal element on, by elimination.

    Whatever is eliminated, what is left is the covariance of a target with its own noise, which is at least 1: smaller
    pivots come from rounding in the kernel, such as in float32 between near-duplicates, and are taken for 1. One
    column after another for all matrices at once: there are many and they are small.

    Yields:
        ``[..., outputs, 1]``, ``[..., outputs − 1, 1]`` and so on.
    """
    while covariance.shape[-1]:
        root = covariance[..., :1, :1].clamp(min=1).sqrt()
        below = covariance[..., 1:, :1] / root
        yield torch.cat([root, below], dim=-2)
        covariance = covariance[..., 1:, 1:] - below * below.mT


def _root(covariance: Tensor) -> Tensor:
    """``R`` with ``R Rᵀ = S`` for ``S ≥ I``, ``[..., outputs, outputs]``, lower triangular."""
    columns = (torch.nn.functional.pad(own, (0, 0, index, 0)) for index, own in enumerate(_columns(covariance)))
    return torch.cat(list(columns), dim=-1)


def _half_logdet(covariance: Tensor) -> Tensor:
    """``½ log det S`` for ``S ≥ I`` of shape ``[..., outputs, outputs]``."""
    return torch.stack([column[..., 0, 0].log() for column in _columns(covariance)]).sum(0)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Products of factors, ``[n, m, outputs, outputs]``."""
    return torch.einsum("ncr,mdr->nmcd", left, right)


def _some(inputs: Any, examples: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[examples] if tensor.ndim else tensor, inputs)
