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
# # Laplace: how sure is a network that is trained already?
#
# Somebody trained a network and you want uncertainties, without training again. A Laplace approximation measures, in
# one pass over the data, how sharply the loss curves around the weights, and takes the Gaussian with that curvature
# for the posterior. This notebook fits one, tunes its prior, compares architectures by it, and shows the mistake that
# makes people give up on it: sampling weights.

# %%
import os

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

SMOKE = os.environ.get("BAYES_KFAC_SMOKE") == "1"  # tiny sizes, for a test that everything runs
torch.set_num_threads(1)
torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The trained network
#
# Plain torch, plain Adam, with a weight decay: a Gaussian prior of precision $\delta$ is a weight decay of $\delta /
# N$ on the mean loss of $N$ examples. A network trained without any is not at the mode under the prior that Laplace
# assumes.


# %%
def curve(x):
    return torch.sin(2 * x) + 0.3 * x


x = torch.cat([torch.rand(40, 1) * 1.6 - 2.4, torch.rand(20, 1) + 1.0])
y = curve(x) + 0.2 * torch.randn(x.shape)
loader = DataLoader(TensorDataset(x, y), batch_size=20)
STEPS = 50 if SMOKE else 2000


def mlp(*widths, outputs=1, inputs=1, activation=nn.Tanh):
    layers, width = [], inputs
    for hidden in widths:
        layers += [nn.Linear(width, hidden), activation()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def train(model, x, y, criterion, decay=1.0):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        prior = 0.5 * decay * sum(parameter.square().sum() for parameter in model.parameters()) / len(x)
        (criterion(model(x), y) + prior).backward()
        optimizer.step()
        schedule.step()
    return model


likelihood = bk.likelihoods.Gaussian(noise_scale=0.2)
torch.manual_seed(0)
model = train(mlp(50), x, y, likelihood)
print(f"RMSE on its own data {(model(x) - y).square().mean().sqrt().item():.3f}")

# %% [markdown]
# ## One pass

# %%
laplace = bk.Laplace(model, likelihood).fit(loader, progress=False)
posterior = laplace.posterior()
print(laplace.summary())
print(f"log marginal likelihood {laplace.log_marginal_likelihood().item():.1f} nats")

# %%
grid = torch.linspace(-3.6, 3.6, 300)[:, None]


def bands(axes, p, title=""):
    line, mean = grid.flatten(), p.mean.flatten()
    total, known = 2 * p.stddev.flatten(), 2 * p.epistemic_variance.sqrt().flatten()
    axes.fill_between(line, mean - total, mean + total, color="#f6d7c3", label="+ noise")
    axes.fill_between(line, mean - known, mean + known, color="#a9c6d8", label="not known")
    axes.plot(line, mean, color="#2a6f97", label="mean")
    axes.plot(line, curve(line), "--", color="#444444", lw=1, label="truth")
    axes.plot(x, y, ".", color="#444444", markersize=4)
    axes.set(ylim=(-4, 4), title=title, xlabel="input")


figure, axes = plt.subplots(figsize=(7, 3))
bands(axes, posterior.predict(grid))
axes.legend(frameon=False, ncols=4, loc="lower center")
plt.show()

# %% [markdown]
# The mean is the network as it was; the bands are new. Outside of the data the truth leaves them: the network
# extrapolates as its architecture does, and Laplace is about the weights of this network only.
#
# ## The prior and the noise
#
# Both were guessed. The evidence, the probability of the training data with the weights integrated out, chooses them
# without validation data. It takes one eigendecomposition for all values.

# %%
precisions = torch.logspace(-2, 3, 40)
evidence = [laplace.log_marginal_likelihood(delta).item() for delta in precisions]
laplace.optimize_prior_precision(noise=True)
tuned = laplace.posterior()
print("by layer:", {name: round(float(delta), 2) for name, delta in tuned.prior_precision.items()})
print(f"noise {tuned.likelihood.noise_scale.item():.3f}, the truth is 0.200")
print(f"log evidence {laplace.log_marginal_likelihood().item():.1f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=[2, 3])
left.semilogx(precisions, evidence, color="#2a6f97")
left.set(xlabel="one precision for all layers", ylabel="log evidence", ylim=(max(evidence) - 40, max(evidence) + 5))
bands(right, tuned.predict(grid), "tuned")
plt.show()

# %% [markdown]
# ## Which architecture?
#
# More weights fit better; the evidence says whether that is worth it. Each network below is trained in the same way;
# its prior is tuned.

# %%
rows = []
for widths in [(1,), (2,), (5,), (20,), (50,), (20, 20)]:
    torch.manual_seed(0)
    candidate = train(mlp(*widths), x, y, likelihood)
    fitted = bk.Laplace(candidate, likelihood).fit(loader, progress=False).optimize_prior_precision()
    nll = likelihood(candidate(x), y).item() * len(x)
    test = torch.cat([torch.rand(500, 1) * 1.6 - 2.4, torch.rand(500, 1) + 1.0])
    error = (candidate(test) - curve(test)).square().mean().sqrt().item()
    rows.append(
        (
            str(widths),
            sum(p.numel() for p in candidate.parameters()),
            -nll,
            fitted.log_marginal_likelihood().item(),
            error,
        )
    )
print("hidden      weights   log-likelihood   evidence   true error, where data are")
for name, count, fit, own, error in rows:
    print(f"{name:10s} {count:8d} {fit:16.1f} {own:10.1f} {error:10.3f}")

# %% [markdown]
# The evidence throws out the network with one unit, by 170 nats. Among the others it is no judge: it likes two units
# best, whose true error is twice that of the larger networks, and likes least the one with two hidden layers, whose
# error is the least. It knows one mode of each network, and blocks that leave out correlations between layers; and 60
# points do not say more. Compare by it what differs clearly, and where there is validation data, use that.
#
# ## The mistake: sampling weights
#
# The curvature is that of the network *linearised* in its weights, and so should predictions be; `predict` does that
# unless told otherwise. The Gaussian is broad in every direction that leaves the linearised network's outputs alone.
# Run the network itself under such draws and its outputs do not stay where they were:

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
generator = torch.Generator().manual_seed(0)
sampled = tuned.predict(grid, "sampling", num_samples=200, generator=generator)
bands(both[0], tuned.predict(grid), "linearised")
bands(both[1], sampled, "sampled weights")
plt.show()
for name, options in [
    ("linearised", {}),
    ("sampled", {"method": "sampling", "num_samples": 200, "generator": generator}),
]:
    p = tuned.predict(x, **options)
    error = (p.mean - y).square().mean().sqrt().item()
    print(f"{name:11s} RMSE on the training data {error:.2f}, log-likelihood {p.log_prob(y).mean().item():.2f}")

# %% [markdown]
# Same posterior, same data. If a Laplace approximation looks useless, look here first.
#
# ## Classes: links, and the last layer
#
# For classes the logits are Gaussian, and probabilities are an integral over them. `link=` says how it is done: by
# draws (`"mc"`, the default) or in closed form. And where the network is large, the last layer alone has a posterior
# at the cost of a forward pass.

# %%
points, labels = make_moons(200, noise=0.2, random_state=0)
points, labels = torch.as_tensor(points, dtype=torch.float32), torch.as_tensor(labels)
classes = DataLoader(TensorDataset(points, labels), batch_size=50)
new, answers = make_moons(1000, noise=0.2, random_state=1)
new, answers = torch.as_tensor(new, dtype=torch.float32), torch.as_tensor(answers)
categorical = bk.likelihoods.Categorical()
torch.manual_seed(0)
classifier = train(mlp(30, inputs=2, outputs=2, activation=nn.ReLU), points, labels, categorical, decay=0.1)

posteriors = {
    "all layers": bk.Laplace(classifier, categorical, prior_precision=0.1).fit(classes, progress=False).posterior(),
    "last layer": bk.Laplace(classifier, categorical, subset="last_layer", prior_precision=0.1)
    .fit(classes, progress=False)
    .posterior(),
}
far = torch.tensor([[4.0, 4.0]])
with torch.no_grad():
    plain = classifier(new).log_softmax(-1).gather(1, answers[:, None]).mean()
    print(f"{'the network itself':32s} log-likelihood {plain:.3f}, at (4, 4) {classifier(far).softmax(-1).max():.3f}")
for name, own in posteriors.items():
    for link in ("mc", "probit", "extended_probit", "laplace_bridge"):
        torch.manual_seed(0)
        options = {"num_samples": 1000} if link == "mc" else {}
        p, q = own.predict(new, link=link, **options), own.predict(far, link=link, **options)
        print(f"{name}, {link:20s} log-likelihood {p.log_prob(answers).mean():.3f}, at (4, 4) {q.probs.max():.3f}")

# %%
side = torch.linspace(-4, 5, 20 if SMOKE else 90)
plane = torch.cartesian_prod(side, side)
with torch.no_grad():
    maps = {"the network itself": classifier(plane).softmax(-1)}
maps |= {name: own.predict(plane, num_samples=500).probs for name, own in posteriors.items()}
figure, panels = plt.subplots(1, 3, figsize=(10, 3.3), sharey=True, layout="constrained")
for axes, (name, probs) in zip(panels, maps.items(), strict=True):
    likelier = probs.max(-1).values.reshape(len(side), -1).T.numpy()
    image = axes.pcolormesh(side.numpy(), side.numpy(), likelier, vmin=0.5, vmax=1, cmap="viridis")
    axes.scatter(*points.T.numpy(), c=labels.numpy(), cmap="coolwarm", s=6, edgecolors="white", linewidths=0.3)
    axes.set(title=name)
figure.colorbar(image, ax=panels, label="probability of the likelier class")
plt.show()

# %% [markdown]
# The network is sure of itself everywhere but on a thin line. With the posterior of all layers the line widens the
# farther it is from the data, with that of the last layer less. More than that is not to be had: at (4, 4) the
# integral (`"mc"`, 1000 draws) is still 0.98, for on a ray the means of the logits grow as fast as their deviations.
# `"probit"` says 0.81 there, which is its error and no insight: it counts the variance that both logits share, and
# the softmax does not see. The bridge all but ignores the variances. On test points like the training data there is
# nothing to gain here, and the broad posterior costs 0.03: uncertainty is for inputs that differ.
#
# ## Where to go on
#
# `posterior.save(path)`; *predictions* in the documentation compares links and methods with figures;
# `laplace.update(loader)` adds data; `optimize_prior_precision("validation", loader=...)` is for when the evidence is
# not to be trusted.
