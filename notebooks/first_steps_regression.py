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
# # First steps in regression
#
# A network that predicts a number should also say how far off it may be, and *why*: because targets are noisy, or
# because it has not seen enough. This notebook trains a small network whose weights are a Gaussian instead of
# numbers, looks at what it says on a curve that can be drawn, and then asks on real data whether its 90 % intervals
# hold 90 % of the targets.

# %%
import os
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

SMOKE = os.environ.get("BAYES_KFAC_SMOKE") == "1"  # tiny sizes, for a test that everything runs
torch.set_num_threads(1)
torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A curve with a gap
#
# Sixty noisy points of a curve, with none between -0.8 and 1. The network has 50 hidden units; nothing about it is
# special.


# %%
def curve(x):
    return torch.sin(2 * x) + 0.3 * x


x = torch.cat([torch.rand(40, 1) * 1.6 - 2.4, torch.rand(20, 1) + 1.0])
y = curve(x) + 0.2 * torch.randn(x.shape)
loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)

model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
likelihood = bk.likelihoods.Gaussian(noise_scale=0.2)  # say that the instrument's error is known
posterior = bk.fit(model, likelihood, loader, epochs=20 if SMOKE else 400, lr=3e-2, progress=False)
print(posterior.summary())

# %% [markdown]
# That was the whole training. `bk.fit` takes the number of examples from the loader: it is the only thing that sets
# the scale between data and prior. A *prediction* is an object that knows a mean and where its variance comes from.

# %%
grid = torch.linspace(-3.6, 3.6, 300)[:, None]
p = posterior.predict(grid)


def bands(axes, p):
    line, mean = grid.flatten(), p.mean.flatten()
    total, known = 2 * p.stddev.flatten(), 2 * p.epistemic_variance.sqrt().flatten()
    axes.fill_between(line, mean - total, mean + total, color="#f6d7c3", label="+ noise")
    axes.fill_between(line, mean - known, mean + known, color="#a9c6d8", label="not known")
    axes.plot(line, mean, color="#2a6f97", label="mean")
    axes.plot(line, curve(line), "--", color="#444444", lw=1, label="truth")
    axes.plot(x, y, ".", color="#444444", markersize=4)
    axes.set(ylim=(-3.2, 3.2), xlabel="input", ylabel="target")


figure, axes = plt.subplots(figsize=(7, 3))
bands(axes, p)
axes.legend(frameon=False, ncols=4, loc="upper center")
plt.show()

# %% [markdown]
# The orange part (`aleatoric_variance`) is the noise: it is as wide everywhere, because the likelihood has one noise
# level. The blue part (`epistemic_variance`) is what more data would remove: narrow among the points, wide in the gap
# and outside. In numbers:

# %%
at = posterior.predict(torch.tensor([[-1.6], [0.0], [3.5]]))
for name, row in zip(["among points", "in the gap", "outside"], range(3), strict=True):
    noise, ignorance = at.aleatoric_variance[row].sqrt().item(), at.epistemic_variance[row].sqrt().item()
    print(f"{name:13s} noise {noise:.2f}  not known {ignorance:.2f}  both {at.stddev[row].item():.2f}")

# %% [markdown]
# Each draw of the weights is a whole function. `function_samples` takes them from the linearised model; they agree
# where data are.

# %%
draws = posterior.sample(12, generator=torch.Generator().manual_seed(1))
functions = posterior.function_samples(grid, draws=draws).squeeze(-1)
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.plot(grid, functions.T, color="#2a6f97", alpha=0.5, lw=1)
axes.plot(x, y, ".", color="#444444", markersize=4)
axes.set(ylim=(-3.2, 3.2), xlabel="input", ylabel="twelve functions")
plt.show()

# %% [markdown]
# ## When the noise is not known
#
# `noise_scale="learned"` fits it, and here the story gets less smooth. With 60 points for 151 weights the objective
# can be greater with a flat function and much noise than with a function that must be known precisely: it then calls
# signal noise. A *temperature* below 1 gives the data more weight against the prior (it divides the prior's part),
# and is the remedy to try first.

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for axes, temperature in zip(both, [1.0, 0.1], strict=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    learned = bk.fit(
        model,
        bk.likelihoods.Gaussian(noise_scale="learned"),
        loader,
        epochs=20 if SMOKE else 400,
        lr=3e-2,
        temperature=temperature,
        progress=False,
    )
    bands(axes, learned.predict(grid))
    axes.set(title=f"temperature {temperature:g}: noise {learned.likelihood.noise_scale.item():.2f} (truth 0.20)")
plt.show()

# %% [markdown]
# A learned noise that is much larger than what you see in the plot of the residuals is the sign to look for. On the
# right the noise is right, and ignorance is the smaller for it: that is what a low temperature does. There is no free
# lunch, but there is held-out data to choose by.

# %% [markdown]
# ## Real data: diabetes
#
# 442 patients, ten measurements each, and how far the disease had progressed a year later. Inputs and targets are
# brought to mean 0 and deviation 1, since the prior expects numbers of size 1. A quarter is held out.

# %%
inputs, targets = (
    torch.as_tensor(array, dtype=torch.float32) for array in load_diabetes(return_X_y=True, scaled=False)
)
targets = targets[:, None]


def split(seed):
    """Standardised training and test parts, and the target's scale in its own unit."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train, test = order[:330], order[330:]
    mean, std = inputs[train].mean(0), inputs[train].std(0)
    centre, scale = targets[train].mean(), targets[train].std()
    x, y = (inputs - mean) / std, (targets - centre) / scale
    return x[train], y[train], x[test], y[test], scale.item()


def train(x, y, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    likelihood = bk.likelihoods.Gaussian(noise_scale="learned")
    return bk.fit(model, likelihood, loader, epochs=5 if SMOKE else 60, lr=3e-2, progress=False)


x_train, y_train, x_test, y_test, scale = split(0)
posterior = train(x_train, y_train, 0)
p = posterior.predict(x_test)
lower, upper = p.interval(0.9)
print(f"RMSE {(p.mean - y_test).square().mean().sqrt() * scale:.1f} of a deviation of {scale:.1f}")
noise, known = p.aleatoric_variance.mean().sqrt() * scale, p.epistemic_variance.mean().sqrt() * scale
print(f"noise {noise:.1f}, not known {known:.1f}")
print(f"within the 90 % interval: {((lower < y_test) & (y_test < upper)).float().mean():.2f}")

# %% [markdown]
# About four fifths of the variance is noise here: the ten measurements do not determine the progression, and more
# patients would not change that. One split says little about coverage; ten say more. Beside it is the usual network,
# trained by Adam for the same number of epochs, whose interval is 1.645 times the deviation of its residuals on the
# training part.


# %%
def by_adam(x, y, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5 if SMOKE else 60):
        for a, b in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(a), b).backward()
            optimizer.step()
    with torch.no_grad():
        return model, (model(x) - y).square().mean().sqrt()


LEVELS = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
coverage = {"bayes_kfac": [], "Adam": []}
scores = {"bayes_kfac": [], "Adam": []}
for seed in range(1 if SMOKE else 10):
    x_train, y_train, x_test, y_test, _ = split(seed)
    p = train(x_train, y_train, seed).predict(x_test)
    model, residual = by_adam(x_train, y_train, seed)
    with torch.no_grad():
        point = torch.distributions.Normal(model(x_test), residual)
    for name, distribution in [("bayes_kfac", p.distribution), ("Adam", point)]:
        ranks = distribution.cdf(y_test).flatten()
        coverage[name].append(torch.stack([((ranks - 0.5).abs() < level / 2).float().mean() for level in LEVELS]))
        scores[name].append(
            torch.stack([(distribution.mean - y_test).square().mean().sqrt(), distribution.log_prob(y_test).mean()])
        )

print("means over splits ± standard errors        RMSE            log-likelihood   90 % coverage")
for name in coverage:
    values = torch.cat([torch.stack(scores[name]), torch.stack(coverage[name])[:, 4:5]], 1)
    error = values.std(0, correction=0) / max(len(values) - 1, 1) ** 0.5
    print(f"{name:38s}", "  ".join(f"{m:6.3f} ± {e:.3f}" for m, e in zip(values.mean(0), error, strict=True)))

# %%
figure, axes = plt.subplots(figsize=(3.8, 3.4))
axes.plot([0.5, 1], [0.5, 1], "--", color="#444444", lw=1)
for (name, rows), color in zip(coverage.items(), ["#2a6f97", "#e07a2f"], strict=True):
    axes.plot(LEVELS, torch.stack(rows).mean(0), "o-", color=color, label=name)
axes.set(xlabel="level of the interval", ylabel="targets inside")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# On the dashed line intervals hold what they promise. Those of the posterior are a little too wide here, 0.945 for
# 0.90: the temperature 1 of the section before, on data that suffer from it less. The usual network's residuals on
# its own training data are far too small, and so are its intervals.
#
# ## Inputs unlike the training data
#
# Train on the patients with a body mass index up to the median, and predict those above it:

# %%
bmi = inputs[:, 2]
low, high = bmi <= bmi.median(), bmi > bmi.median()
mean, std = inputs[low].mean(0), inputs[low].std(0)
centre, scale = targets[low].mean(), targets[low].std()
x, y = (inputs - mean) / std, (targets - centre) / scale
shifted = train(x[low], y[low], 0)
for name, rows in [("like the training data", low), ("heavier", high)]:
    p = shifted.predict(x[rows])
    lower, upper = p.interval(0.9)
    inside = ((lower < y[rows]) & (y[rows] < upper)).float().mean()
    noise, known = p.aleatoric_variance.mean().sqrt() * scale, p.epistemic_variance.mean().sqrt() * scale
    print(f"{name:23s} not known {known:5.1f}   noise {noise:5.1f}   90 % coverage {inside:.2f}")

# %% [markdown]
# The epistemic part nearly doubles, and the intervals go on holding what they promise. That is no guarantee. In the
# very first picture the truth leaves the bands at both ends: a posterior over the weights of this network believes in
# functions that this network makes, and those go on smoothly. Noise that differs between inputs is not known to this
# likelihood either; *Your own network and layer* writes one that does.
#
# ## Keeping it
#
# The file holds tensors and no code; `load` takes a model of the same architecture.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "posterior.safetensors"
    posterior.save(path)
    fresh = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
    again = bk.Posterior.load(path, fresh)
print(torch.equal(again.predict(x_test).variance, posterior.predict(x_test).variance))
print(again.provenance)
