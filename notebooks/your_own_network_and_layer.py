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
# # Your own network, layer and likelihood
#
# The library knows the modules of torch. What if a network has a layer that nobody else has, and targets whose noise
# is not the same everywhere? This notebook has both: a layer for tables of numbers, in which *each feature has
# weights of its own*, and a Gaussian whose standard deviation is an output of the network. Each is one small class
# and one line that registers it.

# %%
import os
from dataclasses import dataclass, field

import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

SMOKE = os.environ.get("BAYES_KFAC_SMOKE") == "1"  # tiny sizes, for a test that everything runs
torch.set_num_threads(1)
torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The data
#
# Three features; the target is a smooth function of two of them, and the noise grows with the first. Where the first
# is above 1.5 there are no training data.


# %%
def truth(x):
    return torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1]


def noise_scale(x):
    return 0.1 + 0.4 * torch.sigmoid(3 * x[:, 0])


def draw(count, low=-2.0, high=1.5):
    x = torch.cat([low + (high - low) * torch.rand(count, 1), torch.randn(count, 2)], 1)
    return x, truth(x) + noise_scale(x) * torch.randn(count)


x, y = draw(100 if SMOKE else 600)
x_test, y_test = draw(100 if SMOKE else 2000)
loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)

# %% [markdown]
# ## The network
#
# `FeatureEmbedding` maps every number $x_f$ to a vector $w_f x_f + b_f$, as in tabular deep learning (Gorishniy et
# al. 2022). It is no linear map of the input: it has one for each feature.


# %%
class FeatureEmbedding(nn.Module):
    """``[batch, features]`` to ``[batch, features, width]``, with weights for each feature."""

    def __init__(self, features, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, width))
        self.bias = nn.Parameter(torch.randn(features, width))

    def forward(self, x):
        return x[..., None] * self.weight + self.bias


def network(outputs):
    return nn.Sequential(
        FeatureEmbedding(3, 12), nn.Tanh(), nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, outputs)
    )


try:
    bk.NoisyKFAC(network(1), bk.likelihoods.Gaussian(), num_data=len(x))
except bk.errors.UnsupportedModelError as error:
    print(error)

# %% [markdown]
# Nothing is skipped silently. Two answers take one word: `others="diagonal"` gives these parameters independent
# Gaussians, and `others="deterministic"` trains them as numbers. `summary()` shows what each parameter gets.

# %%
for others in ("diagonal", "deterministic"):
    print(bk.NoisyKFAC(network(1), bk.likelihoods.Gaussian(), num_data=len(x), others=others).summary(), "\n")

# %% [markdown]
# ## An adapter
#
# An adapter says what a layer's weights multiply. The contract is one shape: inputs as rows `[*blocks, batch, shared,
# in]` with a 1 appended for the bias, and output gradients as rows `[*blocks, batch, shared, out]`. Here each feature
# is a block of its own, with one input: so `blocks` is the number of features, `in` is 1 and the 1 for the bias,
# `out` is the width.


# %%
@bk.curvature.register(FeatureEmbedding)
class FeatureEmbeddingAdapter(bk.curvature.ModuleAdapter):
    """One block ``[w b]`` of shape ``(width, 2)`` for each feature."""

    def input_rows(self, inputs):  # [batch, features] to [features, batch, 1, 1 and the bias's 1]
        return self._append_one(inputs.T[:, :, None, None])

    def gradient_rows(self, gradient):  # [batch, features, width] to [features, batch, 1, width]
        return gradient.movedim(1, 0)[:, :, None, :]

    def _weight_shape(self):  # the weight's shape as a stack of blocks, without the bias
        return (*self.module.weight.shape, 1)


model = network(1)
print(bk.NoisyKFAC(model, bk.likelihoods.Gaussian(), num_data=len(x)).summary())

# %% [markdown]
# How does one know that it is right? The first measured step compares the gradient that the rows add up to with
# autograd's. An adapter with a mistake in it (here: the inputs squared) does not get past it:


# %%
class Copy(FeatureEmbedding):
    def forward(self, x):
        return x[..., None] * self.weight + self.bias


@bk.curvature.register(Copy)
class WrongAdapter(FeatureEmbeddingAdapter):
    def input_rows(self, inputs):
        return super().input_rows(inputs**2)


wrong = nn.Sequential(Copy(3, 12), nn.Flatten(), nn.Linear(36, 1))
try:
    bk.fit(wrong, bk.likelihoods.Gaussian(), [(x, y[:, None])], num_data=len(x), epochs=1, progress=False)
except bk.errors.UnsupportedModelError as error:
    print(error)

# %% [markdown]
# And one can go further: with `structure="dense"` a Laplace posterior of this layer alone must have the covariance
# that is written out from its Jacobian, $(\sum_n J_n^\top J_n / \sigma^2 + \delta I)^{-1}$, within each feature's
# block.

# %%
layer = nn.Sequential(FeatureEmbedding(3, 4), nn.Flatten(), nn.Linear(12, 1)).double()
batch = x[:50].double()
laplace = bk.Laplace(layer, bk.likelihoods.Gaussian(1.0), structure="dense", subset=["0"])
ours = laplace.fit([(batch, y[:50, None].double())], progress=False).posterior().blocks["0"].to_dense()

names = ("0.weight", "0.bias")
jacobians = torch.func.jacrev(lambda own: torch.func.functional_call(layer, own, (batch,)).squeeze(-1))(
    {name: dict(layer.named_parameters())[name].detach() for name in names}
)
J = torch.stack([jacobians[name] for name in names], -1).flatten(2)  # [batch, features, width · 2], bias last
expected = torch.einsum("nfi,nfj->fij", J, J) + torch.eye(8, dtype=torch.float64)
print("largest difference of the precisions:", f"{(ours - expected).abs().max().item():.1e}")

# %% [markdown]
# ## A likelihood
#
# The network gets two outputs, the mean $\mu$ and the logarithm $s$ of the standard deviation. The negative
# log-likelihood is $\frac12 e^{-2s}(y-\mu)^2 + s + \frac12\log 2\pi$; with $y = \mu + e^s\varepsilon$ its gradient is
# $(-\varepsilon e^{-s},\, 1 - \varepsilon^2)$, and the Fisher of the output is $\operatorname{diag}(e^{-2s}, 2)$.
# That is all a likelihood has to know. The library has this one, `likelihoods.HeteroscedasticGaussian`; here it is
# written anew, with predictions by draws, to show what one of your own takes.


# %%
@bk.likelihoods.register
class TwoOutputGaussian(bk.likelihoods.Likelihood):
    """``target ~ N(μ, exp(s)²)`` for outputs ``(μ, s)``, ``[batch, 2]``, and targets ``[batch]``."""

    def check(self, output, target):
        if output.shape != (*target.shape, 2):
            raise bk.errors.TargetError(
                f"output {tuple(output.shape)} must be [batch, 2], target {tuple(target.shape)} [batch]."
            )

    def _elementwise(self, output, target):
        return -self.distribution(output).log_prob(target)

    def distribution(self, output):
        return Normal(output[..., 0], output[..., 1].exp())

    def sample_gradient(self, output, num_samples, generator):
        e = torch.randn((num_samples, *output.shape[:-1]), generator=generator).to(output)
        return torch.stack([-e * (-output[..., 1]).exp(), 1 - e**2], -1)

    def fisher_root(self, output):  # columns whose outer products sum to the Fisher
        zero = torch.zeros_like(output[..., 0])
        return torch.stack([torch.stack([(-output[..., 1]).exp(), zero], -1), torch.stack([zero, zero + 2**0.5], -1)])

    def config(self):
        return {}


likelihood = TwoOutputGaussian()
output = torch.randn(3, 2)
g = likelihood.sample_gradient(output, 200_000, torch.Generator().manual_seed(0))
roots = likelihood.fisher_root(output)
sampled, exact = (torch.einsum("sni,snj->nij", a, a) for a in (g / len(g) ** 0.5, roots))
print("sampled and exact Fisher differ by", f"{((sampled - exact).abs().max() / exact.max()).item():.3f}")

# %% [markdown]
# ## Its prediction
#
# A result object says what the mean and the two variances are. Given draws of the outputs (of the network under
# weight samples, or of the linearised network's Gaussian) it is a mixture of normals; `batch_dim` says along which
# dimension the batch lies.

# %%
from bayes_kfac.prediction import Prediction, from_gaussian, from_outputs
from bayes_kfac.prediction.results import Source, batch_dim


@dataclass(frozen=True)
class HeteroscedasticPrediction(Prediction):
    """A mixture of normals over draws of ``(μ, s)``, ``[num_samples, batch, 2]``."""

    outputs: torch.Tensor = field(metadata=batch_dim(1))
    source: Source

    @property
    def mean(self):
        return self.outputs[..., 0].mean(0)

    @property
    def epistemic_variance(self):
        return self.outputs[..., 0].var(0, correction=0)

    @property
    def aleatoric_variance(self):
        return (2 * self.outputs[..., 1]).exp().mean(0)

    @property
    def distribution(self):
        draws = self.outputs.movedim(0, 1)
        return MixtureSameFamily(Categorical(torch.ones(draws.shape[:2])), Normal(draws[..., 0], draws[..., 1].exp()))

    def log_prob(self, target):
        return self.distribution.log_prob(target)


@from_outputs.register
def _(likelihood: TwoOutputGaussian, outputs, source):
    return HeteroscedasticPrediction(outputs, source)


@from_gaussian.register
def _(likelihood: TwoOutputGaussian, output, source, *, link, num_samples, generator):
    return HeteroscedasticPrediction(output.sample(num_samples, generator), source)


# %% [markdown]
# ## Does it help?
#
# The same network with one noise level for all inputs, and with its own. The temperature is 0.3 for both
# ([why](../docs/scale.md)).

# %%
settings = {"epochs": 3 if SMOKE else 100, "lr": 3e-2, "temperature": 0.3, "progress": False}
torch.manual_seed(1)
columns = DataLoader(TensorDataset(x, y[:, None]), batch_size=50, shuffle=True)
one = bk.fit(network(1), bk.likelihoods.Gaussian("learned"), columns, **settings)
torch.manual_seed(1)
own = bk.fit(network(2), TwoOutputGaussian(), loader, **settings)

generator = torch.Generator().manual_seed(0)
p_one, p_own = one.predict(x_test), own.predict(x_test, num_samples=256, generator=generator)
best = Normal(truth(x_test), noise_scale(x_test)).log_prob(y_test).mean()
print("log-likelihood of test targets")
print(
    f"one noise {p_one.log_prob(y_test[:, None]).mean():.3f}, own {p_own.log_prob(y_test).mean():.3f}, truth {best:.3f}"
)
for name, deviation, mean in [
    ("one noise", p_one.stddev.squeeze(1), p_one.mean.squeeze(1)),
    ("own", p_own.stddev, p_own.mean),
]:
    inside = (y_test - mean).abs() < 1.645 * deviation
    quiet = x_test[:, 0] < -0.5
    parts = inside[quiet].float().mean(), inside[~quiet].float().mean()
    print(f"{name:9s} 90 % coverage: where quiet {parts[0]:.2f}, where noisy {parts[1]:.2f}")

# %%
grid = torch.zeros(200, 3)
grid[:, 0] = torch.linspace(-2.5, 3, 200)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, p, title in zip(
    axes,
    [one.predict(grid), own.predict(grid, num_samples=512, generator=generator)],
    ["one noise", "own"],
    strict=True,
):
    line = grid[:, 0]
    ax.plot(line, noise_scale(grid), "--", color="#444444", lw=1, label="true noise")
    ax.plot(line, p.aleatoric_variance.sqrt().flatten(), color="#e07a2f", label="noise")
    ax.plot(line, p.epistemic_variance.sqrt().flatten(), color="#2a6f97", label="not known")
    ax.axvspan(1.5, 3, color="#eeeeee", zorder=0)
    ax.set(title=title, xlabel="first feature; no data in grey", ylim=(0, 1.2))
axes[0].set_ylabel("standard deviation")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Where data are, the second network's noise follows the truth. In the grey part there is nothing to learn it from:
# its noise there is an extrapolation like any other, and nothing warns of it but the epistemic part, which is about
# the mean only.
#
# The likelihood is registered, so the posterior is saved and loaded like any other. What is left out here, masks and
# targets with several dimensions, is in the likelihoods of the library, each of them a page long.
