"""Output gradients whose outer products are the Fisher of one example's output.

``output_gradients`` gives ``u`` of shape ``[columns, batch, ...]`` with ``Σ_c u_c u_cᵀ = F_output`` of each example:
exactly (``"exact"``, the generalised Gauss-Newton), in expectation over targets sampled from the model (``"mc"``), or
from the given targets (``"empirical"``, which is not the Fisher; Kunstner et al. 2019). ``"recursive"`` takes the exact
ones, and pulls them back by :mod:`bayes_kfac.curvature.recursion`. Gradients are of one example's negative
log-likelihood, never of the batch mean.

With Kronecker factors these are methods with names of their own: ``"mc"`` is K-FAC, ``"exact"`` is KFLR (all columns of
the output's Hessian pulled back, ``G = E[H_l]``) and ``"recursive"`` is KFRA (Botev, Ritter & Barber 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kfac import linalg
from bayes_kfac.errors import UsageError, check_choice
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.likelihoods.base import check_examples

#: Kinds that pull each example's own gradients back.
EXAMPLEWISE_KINDS: tuple[str, ...] = ("mc", "exact", "empirical")
FISHER_KINDS: tuple[str, ...] = (*EXAMPLEWISE_KINDS, "recursive")


def output_gradients(
    likelihood: Likelihood,
    output: Tensor,
    fisher: str,
    *,
    target: Tensor | None = None,
    mask: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Output gradients of each example, scaled so that their outer products sum to its output Fisher.

    Args:
        likelihood: What the output means.
        output: The model's output, ``[batch, ...]``.
        fisher: ``"mc"``, ``"exact"``, ``"empirical"`` or ``"recursive"``.
        target: The targets; needed for ``"empirical"`` only.
        mask: Which targets weigh, as the likelihood takes it; outputs of the others have no gradient.
        num_samples: How many targets to sample for ``"mc"``.
        generator: The source of randomness for ``"mc"``.

    Returns:
        ``[columns, batch, ...]``, without a graph, in the output's dtype.

    Raises:
        UsageError: If ``fisher="empirical"`` comes without targets.
        TargetError: If the output holds no example.
    """
    check_choice("fisher", fisher, FISHER_KINDS)
    check_examples(output)
    dtype, output = output.dtype, output.detach()
    output = output.to(linalg.algebra_dtype(dtype))  # 16 bits are too few for small probabilities and large precisions
    if fisher in ("exact", "recursive"):
        gradients = likelihood.fisher_root(output)
    elif fisher == "mc":
        gradients = likelihood.sample_gradient(output, num_samples, generator) / num_samples**0.5
    elif target is None:
        raise UsageError("fisher='empirical' needs the targets: call likelihood(output, target) in the loop.")
    else:
        gradients = likelihood.target_gradient(output, target, mask).unsqueeze(0)
    if mask is not None:
        gradients = torch.where(likelihood.output_mask(mask, output), gradients, torch.zeros_like(gradients))
    return gradients.to(dtype)
