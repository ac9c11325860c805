"""How ``images.py`` trains and predicts: an optimizer for each method, and the logits of what it ends with.

A prediction is a function from a batch to logits ``[draws, batch, classes]``, the average of whose probabilities is
what is predicted; a point estimate has one draw.

Settings of the MLP and the CNN were chosen on Fashion-MNIST by ``images_tuning.py``, by the loss on the last 10 000
training images, from as many of each method. Those of the narrow VGG16 were chosen so on CIFAR-10, from smaller grids
and runs at full length (with batch normalisation noisy EK-FAC's are noisy K-FAC's), and the narrow ResNet-18 has them
too; those of VGG16 and ResNet-18 are the paper's or customary, and not tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import bayes_kfac as bk

DRAWS = 30
CURVE_DRAWS = 10  # at the end of every epoch

Predictor = Callable[[Tensor], Tensor]


# -- training ---------------------------------------------------------------------------------------------------------


def sgd(model: nn.Module, num_data: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    del num_data
    return torch.optim.SGD(model.parameters(), momentum=0.9, **settings)


def adamw(model: nn.Module, num_data: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay."""
    del num_data
    return torch.optim.AdamW(model.parameters(), fused=True, **settings)


def ivon(model: nn.Module, num_data: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """The improved variational online Newton method (Shen et al. 2024), by its authors' package."""
    import ivon as peer

    return peer.IVON(model.parameters(), ess=num_data, **settings)


def noisy_kfac(model: nn.Module, num_data: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Noisy K-FAC."""
    return bk.NoisyKFAC(model, bk.likelihoods.Categorical(), num_data=num_data, **_with_groups(model, settings))


def noisy_ekfac(model: nn.Module, num_data: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Noisy EK-FAC."""
    return bk.NoisyEKFAC(model, bk.likelihoods.Categorical(), num_data=num_data, **_with_groups(model, settings))


def _with_groups(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The scales of normalisations are 1 at the start: the prior that suits weights would hold them near 0."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    parameters = [parameter for module in norms for parameter in module.parameters()]
    return {**settings, "groups": [{"params": parameters, "prior_precision": 1.0}]} if parameters else settings


TRAINERS: dict[str, Callable[[nn.Module, int, dict[str, Any]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "ivon": ivon,
    "noisy_kfac": noisy_kfac,
    "noisy_ekfac": noisy_ekfac,
}

#: Without the warm-up, whose identity holds the steps short for most of so few epochs; what keeps the first steps from
#: going too far is the extrinsic damping.
_NOISY: dict[str, Any] = {
    "lr": 0.1,
    "prior_precision": 100.0,
    "temperature": 0.3,
    "extrinsic_damping": 1e-2,
    "kl_clip": 1e-2,
    "warmup": False,
    "statistics_every": 5,
    "inverse_every": 20,
}
#: The linear layer of the CNN has 1569 inputs, whose factor is dear to refresh.
_NOISY_CNN = {**_NOISY, "extrinsic_damping": 3e-2, "statistics_every": 10, "inverse_every": 50}
#: Settings by network and method.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {
        "sgd": {"lr": 0.1, "weight_decay": 5e-4},
        "adamw": {"lr": 4e-3, "weight_decay": 0.5},
        "ivon": {"lr": 1.0, "weight_decay": 1e-4, "hess_init": 0.5, "beta2": 0.9999},
        "noisy_kfac": _NOISY,
        "noisy_ekfac": {**_NOISY, "extrinsic_damping": 3e-2},
    },
    "cnn": {
        "sgd": {"lr": 0.06, "weight_decay": 5e-4},
        "adamw": {"lr": 8e-3, "weight_decay": 0.1},
        "ivon": {"lr": 0.3, "weight_decay": 2e-5, "hess_init": 1.0, "beta2": 0.9999},
        "noisy_kfac": _NOISY_CNN,
        "noisy_ekfac": {**_NOISY_CNN, "inverse_every": 100},
    },
}
#: What the paper's code does for VGG16, in this library's terms: its momentum of .9 takes ten times the step.
_VGG16 = {
    "lr": 0.1,
    "prior_precision": 10.0,
    "temperature": 0.5,
    "extrinsic_damping": 1e-3,
    "kl_clip": 1e-3,
    "inverse_every": 200,
}
SETTINGS["vgg16"] = {
    "sgd": {"lr": 0.03, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 5e-2},
    "ivon": {"lr": 0.1, "weight_decay": 2e-4, "hess_init": 0.5, "beta2": 0.9999},
    "noisy_kfac": _VGG16,
    "noisy_ekfac": _VGG16,
}
#: What ``images_tuning.py`` chose; so few steps need a colder posterior than the paper's many, and a stronger prior. Of
#: steps of 0.1 the clip would hold most.
_NARROW = {
    **_VGG16,
    "lr": 0.03,
    "prior_precision": 300.0,
    "temperature": 0.1,
    "kl_clip": 1e-2,
    "inverse_every": 20,
}
SETTINGS["vgg16_narrow"] = {
    "sgd": {"lr": 0.01, "weight_decay": 5e-3},
    "adamw": {"lr": 5e-4, "weight_decay": 5.0},
    "ivon": {"lr": 0.2, "weight_decay": 2e-4, "hess_init": 4.0, "beta2": 0.9999},
    "noisy_kfac": _NARROW,
    "noisy_ekfac": {
        **_NARROW,
        "lr": 0.1,
        "extrinsic_damping": 1e-2,
        "kl_clip": 1e-3,
        "prior_precision": 1000.0,
        "inverse_every": 100,
    },
}
_NORMALIZED = {**_VGG16, "prior_precision": 1.0, "kl_clip": 1e-2}
SETTINGS["vgg16_bn"] = {**SETTINGS["vgg16"], "noisy_kfac": _NORMALIZED, "noisy_ekfac": _NORMALIZED}
SETTINGS["resnet18"] = SETTINGS["vgg16_bn"]
_NARROW_NORMALIZED = {**_NARROW, "prior_precision": 1000.0, "warmup": False}
SETTINGS["vgg16_bn_narrow"] = {
    "sgd": {"lr": 0.03, "weight_decay": 5e-3},
    "adamw": {"lr": 2e-3, "weight_decay": 5.0},
    "ivon": {"lr": 0.2, "weight_decay": 2e-4, "hess_init": 4.0, "beta2": 0.9999},
    "noisy_kfac": _NARROW_NORMALIZED,
    "noisy_ekfac": _NARROW_NORMALIZED,
}
SETTINGS["resnet18_narrow"] = SETTINGS["vgg16_bn_narrow"]
#: Augmented images are more than there are: the paper lowers the weight of the KL.
_COLDER = {"noisy_kfac": {"temperature": 0.1}, "noisy_ekfac": {"temperature": 0.1}}
#: What changes with augmented images, by network and method.
AUGMENTED: dict[str, dict[str, dict[str, Any]]] = {
    "vgg16": _COLDER,
    "vgg16_bn": _COLDER,
    "resnet18": _COLDER,
    "vgg16_narrow": {
        "sgd": {"weight_decay": 5e-4},
        "adamw": {"weight_decay": 0.5},
        "noisy_kfac": {"lr": 0.1, "kl_clip": 1e-3},
    },
    "vgg16_bn_narrow": {"adamw": {"weight_decay": 0.5}, "noisy_kfac": {"prior_precision": 100.0}},
}
AUGMENTED["resnet18_narrow"] = AUGMENTED["vgg16_bn_narrow"]


def settings(network: str, method: str, *, augment: bool = False) -> dict[str, Any]:
    """A method's settings for a network."""
    return {**SETTINGS[network][method], **(AUGMENTED.get(network, {}).get(method, {}) if augment else {})}


def gradient_context(optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
    """Where a step's gradient is taken: at a draw of the weights, if the optimizer draws them."""
    if isinstance(optimizer, bk.NoisyNaturalGradient):
        return optimizer.sampled_params()
    return optimizer.sampled_params(train=True) if hasattr(optimizer, "sampled_params") else nullcontext()


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any], steps: int, device: str) -> None:
    """Go on from a state; IVON leaves its count of steps out of it, and its tensors where they were kept."""
    optimizer.load_state_dict(state)
    if hasattr(optimizer, "current_step"):
        optimizer.current_step = steps
        for group in optimizer.param_groups:
            group.update({name: value.to(device) for name, value in group.items() if isinstance(value, Tensor)})


# -- predicting -------------------------------------------------------------------------------------------------------


def at_mean(model: nn.Module) -> Predictor:
    """The network itself."""
    return lambda x: model(x).unsqueeze(0)


def of_members(models: Sequence[nn.Module]) -> Predictor:
    """Several networks."""
    return lambda x: torch.stack([model(x) for model in models])


def of_ivon(model: nn.Module, optimizer: Any, draws: int) -> Predictor:
    """Draws of IVON's posterior, new ones for every batch."""

    def predict(x: Tensor) -> Tensor:
        outputs = []
        for _ in range(draws):
            with optimizer.sampled_params():
                outputs.append(model(x))
        return torch.stack(outputs)

    return predict


def of_draws(posterior: bk.Posterior, count: int) -> Predictor:
    """Draws of a posterior, the same networks for all batches."""
    draws = posterior.sample(count)
    return lambda x: posterior.predict(x, draws=draws).logits


def linearized(posterior: bk.Posterior, link: str = "mc") -> Predictor:
    """The linearised network's Gaussian logits, by a link to probabilities."""

    def predict(x: Tensor) -> Tensor:
        logits = posterior.predict(x, link=link).logits
        return logits if link == "mc" else logits.unsqueeze(0)

    return predict


def own_prediction(model: nn.Module, optimizer: torch.optim.Optimizer, draws: int) -> Predictor:
    """What a trained method predicts with: draws, if it has a posterior."""
    if isinstance(optimizer, bk.NoisyNaturalGradient):
        return of_draws(optimizer.posterior(), draws)
    return of_ivon(model, optimizer, draws) if hasattr(optimizer, "sampled_params") else at_mean(model)


def further_predictions(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Predictor]:
    """Other predictions with the same posterior."""
    if isinstance(optimizer, bk.NoisyNaturalGradient):
        return {"mean": at_mean(model), "linearized": linearized(optimizer.posterior())}
    return {"mean": at_mean(model)} if hasattr(optimizer, "sampled_params") else {}


def laplace(model: nn.Module, loader: Iterable[Any], subset: str) -> tuple[bk.Posterior, dict[str, Any]]:
    """A Laplace fit, the prior's precision of each layer where the evidence is greatest."""
    fit = bk.Laplace(model, bk.likelihoods.Categorical(), subset=subset).fit(loader, progress=False)
    fit.optimize_prior_precision()
    return fit.posterior(), {name: float(value) for name, value in fit.prior_precision.items()}
