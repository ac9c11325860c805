# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A network inside a Pyro model
#
# A network is often only one part of a model. Here a curve was measured by six instruments, each of which is off by a
# constant of its own, and how noisy they are is unknown too. A network with a bayes_kfac posterior is the curve; Pyro
# infers the rest.

# %%
import copy
import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

SMOKE = os.environ.get("BAYES_KFAC_SMOKE") == "1"
EPOCHS, STEPS, DRAWS = (3, 5, 10) if SMOKE else (300, 400, 300)
INSTRUMENTS, PRIOR_PRECISION = 6, 0.5
torch.set_num_threads(1)
pyro.set_rng_seed(0)

# %% [markdown]
# Made-up data, so that the truth is known: 240 measurements of a sine, offsets with a standard deviation of 0.7, noise
# of 0.15. Every fourth measurement is held back.

# %%
x = 4 * torch.rand(240, 1) - 2
instrument = torch.arange(240) % INSTRUMENTS
true_offset = 0.7 * torch.randn(INSTRUMENTS)
true_offset -= true_offset.mean()  # a constant that all share is the curve's
y = (2 * x).sin() + true_offset[instrument, None] + 0.15 * torch.randn(240, 1)
held_back = torch.rand(240) < 0.25
train, test = ([part[rows] for part in (x, instrument, y)] for rows in (~held_back, held_back))
print(len(train[0]), "to learn from,", len(test[0]), "held back; offsets", true_offset.numpy().round(2))

# %% [markdown]
# ## The network alone
#
# It knows nothing of instruments, so that their offsets are noise to it.


# %%
def fit(targets, noise_scale):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    loader = DataLoader(TensorDataset(train[0], targets), batch_size=20, shuffle=True)
    likelihood = bk.likelihoods.Gaussian(noise_scale)
    return bk.fit(network, likelihood, loader, epochs=EPOCHS, lr=0.1, prior_precision=PRIOR_PRECISION, progress=False)


posterior = fit(train[2], "learned")
print(f"noise: {posterior.likelihood.noise_scale.item():.2f}")

# %% [markdown]
# In Pyro this is a model and a guide, and `Trace_ELBO` is what it should be: the expected log-likelihood less the
# divergence from the prior. Both are estimated here, from different draws.

# %%
alone = bk.pyro.generative_model(posterior)
alone_guide = posterior.to_pyro_guide(alone)
elbo = -Trace_ELBO(num_particles=DRAWS).loss(alone, alone_guide, train[0], train[2])
outputs = posterior.predict(train[0], "sampling", num_samples=DRAWS).outputs
log_likelihood = posterior.likelihood.distribution(outputs).log_prob(train[2]).sum((1, 2))
print(f"Trace_ELBO {elbo:.1f}; E[log p(y | w)] - KL = {log_likelihood.mean() - posterior.kl():.1f}")

# %% [markdown]
# ## The whole model
#
# A copy of the network becomes a Pyro module whose parameters are random, under the prior that the posterior was
# fitted under. Offsets and noise are further sites. What the weights' guide is, is decided: the posterior, frozen.


# %%
class Instruments(PyroModule):
    def __init__(self, network):
        super().__init__()
        self.curve = copy.deepcopy(network)
        to_pyro_module_(self.curve)
        for module in self.curve.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                prior = dist.Normal(torch.zeros_like(value), PRIOR_PRECISION**-0.5).to_event(value.dim())
                setattr(module, name, PyroSample(prior))
        self.offset = PyroSample(dist.Normal(torch.zeros(INSTRUMENTS), 1.0).to_event(1))
        self.noise = PyroSample(dist.LogNormal(-1.0, 1.0))

    def forward(self, x, instrument, y=None):
        mean = self.curve(x) + self.offset[..., instrument, None]
        noise = self.noise
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, noise).to_event(1), obs=y)
        return mean


def infer_the_rest(posterior):
    """The model, and a guide of two parts: the posterior, and what is trained here."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Instruments(posterior.model)
    guide = AutoGuideList(model)
    guide.append(posterior.to_pyro_guide(model))
    guide.append(AutoNormal(poutine.block(model, expose=["offset", "noise"]), init_scale=0.05))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.995}), Trace_ELBO(num_particles=4))
    losses = [svi.step(*train) for _ in range(STEPS)]
    return model, guide, losses


model, guide, losses = infer_the_rest(posterior)
print({name: tuple(value.shape) for name, value in guide(*train).items()})
print("trained:", sorted(pyro.get_param_store()))
print("offsets", guide.median(*train)["offset"].numpy().round(2), "true", true_offset.numpy().round(2))
print(f"noise {guide.median(*train)['noise']:.2f}, true 0.15")

# %% [markdown]
# The offsets are found; the noise is somewhat too large, because the posterior of the curve was fitted when the
# offsets still were noise: it is broader than it has to be, and a frozen guide does not learn of that. A second round
# does: the network is fitted again to what the offsets leave, and the rest is inferred again. This is coordinate
# ascent, one part of the guide at a time, each by the method that suits it.

# %%
offset, noise = (guide.median(*train)[name] for name in ("offset", "noise"))
second = fit(train[2] - offset[train[1], None], float(noise))
second_model, second_guide, second_losses = infer_the_rest(second)
print("offsets", second_guide.median(*train)["offset"].numpy().round(2), "true", true_offset.numpy().round(2))
print(f"noise {second_guide.median(*train)['noise']:.2f}, true 0.15")
late = slice(-max(1, STEPS // 10), None)
for name, values in [("first round", losses), ("second round", second_losses)]:
    print(f"{name}: ELBO {-sum(values[late]) / len(values[late]):.1f}")

# %% [markdown]
# ## Predictions
#
# `Predictive` draws weights, offsets and noise from the guide, and targets from the model.

# %%
results = {}
grid = torch.linspace(-2.5, 2.5, 81)[:, None]
for name, (one, its_guide) in {"first": (model, guide), "second": (second_model, second_guide)}.items():
    weights = Predictive(its_guide, num_samples=DRAWS)(*test[:2])
    mean = Predictive(one, weights, return_sites=["_RETURN"])(*test[:2])["_RETURN"]
    density = dist.Normal(mean, weights["noise"].reshape(-1, 1, 1)).log_prob(test[2])
    results[f"with instruments, {name} round"] = density.logsumexp(0).mean() - torch.tensor(DRAWS).log()
results["network alone"] = posterior.predict(test[0], "sampling", num_samples=DRAWS).log_prob(test[2]).mean()
for name, value in results.items():
    print(f"{name:32} log-likelihood of a held-back target {value:6.2f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True)
colours = plt.get_cmap("tab10")(range(INSTRUMENTS))
prediction = posterior.predict(grid, "sampling", num_samples=DRAWS)
axes[0].fill_between(grid[:, 0], *(bound[:, 0] for bound in prediction.interval(0.9)), color="tab:gray", alpha=0.3)
axes[0].plot(grid[:, 0], prediction.mean[:, 0], color="black")
axes[0].scatter(train[0], train[2], c=colours[train[1]], s=6)
axes[0].set(title="network alone, 90 % of targets", xlabel="input", ylabel="target")
for axis, chosen in zip(axes[1:], (int(true_offset.argmax()), int(true_offset.argmin())), strict=True):
    which = torch.full((len(grid),), chosen)
    drawn = Predictive(second_model, guide=second_guide, num_samples=DRAWS, return_sites=["obs"])(grid, which)
    lower, middle, upper = drawn["obs"][..., 0].quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
    axis.fill_between(grid[:, 0], lower, upper, color=colours[chosen], alpha=0.3)
    axis.plot(grid[:, 0], middle, color=colours[chosen])
    axis.plot(grid[:, 0], (2 * grid[:, 0]).sin() + true_offset[chosen], "--", color="black", lw=1, label="truth")
    axis.scatter(train[0][train[1] == chosen], train[2][train[1] == chosen], color=colours[chosen], s=8)
    axis.set(title=f"instrument {chosen}, 90 % of targets", xlabel="input")
axes[1].legend(loc="lower right")
figure.tight_layout()

# %% [markdown]
# ## Its marginals, and keeping it
#
# Medians and quantiles go through the whole list of guides; the posterior's part is a module like any other. Where
# blocks are matrix normals, the sites are `MatrixNormal`.

# %%
quantiles = second_guide.quantiles([0.05, 0.95], *train)
print({name: tuple(value.shape) for name, value in quantiles.items()})
for index, (low, high) in enumerate(quantiles["offset"].T):
    print(f"instrument {index}: {low:5.2f} to {high:5.2f}, true {true_offset[index]:5.2f}")
trace = poutine.trace(second_guide).get_trace(*train)
print(trace.nodes["curve.0_block"]["fn"])
state = second_guide[0].state_dict()
print({name: tuple(value.shape) for name, value in state.items()})

# %% [markdown]
# The quantiles of the offsets are those of a mean-field guide next to a frozen one: whatever the curve and all offsets
# could trade against each other is not in them, and they are narrower than they ought to be. A guide for `offset` that
# is conditional on the weights, or NUTS on `bk.pyro.generative_model` where the network is small, would say more.
