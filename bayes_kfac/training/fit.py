"""``fit``: the training loop in one call, with a progress bar, callbacks, and the posterior as the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from bayes_kfac.batches import Batch, call, check_has_batch, count_examples, expect_output_tensor, unpack
from bayes_kfac.curvature import check_types, find_covered, unwrapped
from bayes_kfac.errors import ArgumentError, check_choice, check_count
from bayes_kfac.likelihoods import Likelihood
from bayes_kfac.posterior import Posterior
from bayes_kfac.prediction.forward import training
from bayes_kfac.progress import progress_bar
from bayes_kfac.structures import Structure
from bayes_kfac.training.checks import check_params
from bayes_kfac.training.noisy import NoisyNaturalGradient
from bayes_kfac.training.tuning import EXTRINSIC_DAMPING, TUNE_KINDS, tune_prior_precision


@dataclass(frozen=True)
class FitState:
    """What a callback sees at the end of an epoch.

    Attributes:
        epoch: Epochs done, from 1.
        nll: The mean negative log-likelihood per example at sampled weights over this epoch, in nats.
        kl: The divergence of the posterior from the prior, in nats.
        elbo: The evidence lower bound of the whole training set, ``−num_data · nll − kl``, in nats.
        optimizer: The trainer; ``optimizer.posterior()`` is the posterior so far.
        model: The model.
    """

    epoch: int
    nll: float
    kl: float
    elbo: float
    optimizer: NoisyNaturalGradient
    model: nn.Module


Callback = Callable[[FitState], bool | None]


def fit(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any],
    *,
    epochs: int,
    num_data: int | None = None,
    structure: str | Structure = "kron",
    lr: float = 0.1,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    tune: str | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Any,
) -> Posterior:
    """Train a posterior over a model's weights by noisy natural gradient.

    Args:
        model: The model; trained in place, it ends at the posterior's mean, each module in the mode it came in.
        likelihood: What its output means.
        loader: Yields batches, gone through once an epoch: ``(inputs, target)``, ``(inputs, target, mask)``, or
            mappings or dataclasses with a field ``target`` or ``labels``, maybe a ``mask``, and the model's keyword
            arguments.
        epochs: How often.
        num_data: The number of training examples; by default the length of ``loader.dataset``.
        structure: The family of the posterior's blocks, by name or with options of its own.
        lr: The step size; by default it decays to zero over the run along a half cosine.
        scheduler: Makes another schedule from the optimizer; stepped after each epoch, a ``ReduceLROnPlateau`` with the
            epoch's ``nll`` of :class:`FitState`.
        tune: ``"marginal_likelihood"`` to choose the prior's precision after each epoch but the first tenth, one for
            each layer, or for each of ``groups``: where the evidence is greatest; ``extrinsic_damping`` is 0.01 then
            by default, without which the prior of a long training may fade away. ``None`` to leave it as it is.
        callbacks: Called after each epoch with a :class:`FitState`; one that returns ``True`` ends the training.
        progress: Whether to show a progress bar with the parts of the evidence lower bound.
        options: Further arguments of :class:`NoisyNaturalGradient`, such as ``prior_precision`` or ``damping``.

    Returns:
        The posterior.

    Raises:
        ArgumentError: If ``num_data`` is not given and the loader cannot tell, the loader is empty, or callbacks are
            no list of functions.

    Example:
        >>> import bayes_kfac as bk, torch
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x**2), batch_size=16)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> posterior = bk.fit(model, bk.likelihoods.Gaussian(0.1), loader, epochs=2, progress=False)
        >>> posterior.provenance.num_data
        64

        A callback that returns ``True`` ends the training:

        >>> def enough(state):
        ...     return state.epoch == 3
        >>> again = bk.fit(
        ...     model, bk.likelihoods.Gaussian(0.1), loader, epochs=50, callbacks=[enough], progress=False
        ... )
    """
    epochs = check_count("epochs", epochs)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ArgumentError(f"callbacks={callbacks!r} is not allowed. Allowed: a list of functions, [function].")
    if scheduler is not None and not callable(scheduler):
        raise ArgumentError(
            f"scheduler={scheduler!r} is not allowed. Allowed: a function of the optimizer that returns a scheduler."
        )
    if tune is not None:
        check_choice("tune", tune, TUNE_KINDS)
        check_types(model, likelihood)
        if options.get("params") is not None:
            options["params"] = check_params(model, options["params"])
        options.setdefault("groups", _one_for_each_layer(model, options))
        options.setdefault("extrinsic_damping", EXTRINSIC_DAMPING)
    optimizer = NoisyNaturalGradient(
        model,
        likelihood,
        num_data=_num_data(loader) if num_data is None else num_data,
        structure=structure,
        lr=lr,
        **options,
    )
    schedule = scheduler(optimizer) if scheduler else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    with training(model), progress_bar(total=epochs, desc="fit", unit="epoch", shown=progress) as bar:
        for epoch in range(1, epochs + 1):
            nll = _train_epoch(model, likelihood, loader, optimizer)
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(nll)
            else:
                schedule.step()
            if tune is not None and 10 * epoch > epochs:
                tune_prior_precision(optimizer)
            kl = float(optimizer.kl())
            state = FitState(epoch, nll, kl, -optimizer.num_data * nll - kl, optimizer, model)
            bar.set_postfix(nll=f"{nll:.4f}", kl=f"{kl:.1f}", elbo=f"{state.elbo:.1f}")
            bar.update()
            answers = [callback(state) for callback in callbacks]
            if any(answers):
                break
    return optimizer.posterior()


def _train_epoch(
    model: nn.Module, likelihood: Likelihood, loader: Iterable[Any], optimizer: NoisyNaturalGradient
) -> float:
    """One pass over the data; returns the mean negative log-likelihood per example."""
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    count = 0.0
    for raw in loader:
        batch = unpack(raw).to(device)
        examples = 0 if batch.is_empty else len(batch.target) if batch.mask is None else count_examples(batch.mask)
        if not examples:
            continue

        def closure(batch: Batch = batch) -> torch.Tensor:
            optimizer.zero_grad()
            output = expect_output_tensor(call(model, batch.inputs))
            check_has_batch(batch.inputs, output)
            loss = likelihood(output, batch.target, batch.mask)
            loss.backward()
            return loss.detach()

        total += optimizer.step(closure) * examples
        count += examples
    if not count:
        raise ArgumentError(
            f"loader={loader!r} yielded no example. An iterator is used up after one epoch: pass a DataLoader or a "
            "list."
        )
    return float(total / count)


def _one_for_each_layer(model: nn.Module, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A parameter group for each layer that will have a posterior."""
    model, _ = unwrapped(model)
    chosen = model.parameters() if options.get("params") is None else options["params"]
    trainable = [parameter for parameter in chosen if parameter.requires_grad]
    layers, _ = find_covered(model, trainable, options.get("others", "error"))
    return [{"params": list(layer.parameters.values())} for layer in layers.values()]


def _num_data(loader: Iterable[Any]) -> int:
    length = length_hint(getattr(loader, "dataset", None), -1)  # streams may have a len() that raises
    if length >= 0:
        return length
    if isinstance(loader, Dataset):
        raise ArgumentError(
            f"loader is a data set ({type(loader).__name__}), which yields single examples. Pass batches of it: "
            "DataLoader(data, batch_size=32, shuffle=True)."
        )
    if isinstance(loader, tuple | list) and loader and isinstance(loader[0], Tensor):
        raise ArgumentError(
            f"loader is a {type(loader).__name__} of tensors. Pass batches of them: "
            "DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)."
        )
    raise ArgumentError(
        f"num_data=None, but the loader ({type(loader).__name__}) has no dataset with a length. Pass num_data=, "
        "the number of examples in the training set."
    )
