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
# # Classification and calibration
#
# A network that sorts images says "a seven, 98 %". Four questions, and what a posterior over its weights changes:
#
# 1. Are 98 % of such answers right? (*calibration*)
# 2. If the least certain answers are withheld, are the rest better? (*selective prediction*)
# 3. Does it notice an image of a kind that it has never seen? (*out of distribution*)
# 4. Is it unsure because the image is ambiguous, or because it has seen too little? (*aleatoric and epistemic*)
#
# The data are scikit-learn's handwritten digits, 8×8 pixels. The networks see 300 images of the digits 0 to 7; eights
# and nines are kept away from them, to play the unknown.

# %%
import os

import matplotlib.pyplot as plt
import torch
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kfac as bk

SMOKE = os.environ.get("BAYES_KFAC_SMOKE") == "1"
SEEDS = range(1 if SMOKE else 5)
EPOCHS = 4 if SMOKE else 60
MEMBERS = 2 if SMOKE else 5
DRAWS = 16 if SMOKE else 256
torch.set_num_threads(1)

digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32) / 16
labels = torch.as_tensor(digits.target)
known = labels < 8
unseen = images[~known].flatten(1)
images, labels = images[known], labels[known]
print(f"{len(images)} images of the digits 0 to 7, {len(unseen)} eights and nines")

# %% [markdown]
# ## Five ways to predict
#
# One architecture, 64-100-8, throughout.
#
# - **point estimate**: AdamW, softmax. The baseline.
# - **ensemble**: five such networks from different starts, probabilities averaged. It costs five trainings.
# - **Laplace, evidence**: a Gaussian around the point estimate's last layer, its prior precision where the evidence
#   is greatest.
# - **Laplace, validation**: the same, its prior precision the one that predicts 100 held-back images best.
# - **noisy K-FAC**: the posterior is trained instead of the weights. The temperature 0.1 was set by hand, once; at 1
#   it is too broad on so few images.


# %%
def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 8))


def batches(x, y, seed):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True, generator=generator)


def point_estimate(x, y, seed):
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for inputs, target in batches(x, y, seed):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
        schedule.step()
    return model


def laplace(model, data, **prior):
    fitted = bk.Laplace(model, bk.likelihoods.Categorical(), subset="last_layer").fit(data, progress=False)
    return fitted.optimize_prior_precision(progress=False, **prior).posterior()


def noisy_kfac(x, y, seed):
    return bk.fit(
        network(seed),
        bk.likelihoods.Categorical(),
        batches(x, y, seed),
        epochs=EPOCHS,
        lr=0.1,
        temperature=0.1,
        statistics_every=2,
        inverse_every=20,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )


# %% [markdown]
# Every method becomes one function from images to probabilities under several draws, `[draws, images, classes]`: one
# draw for the point estimate, five for the ensemble, 256 for a posterior. All that follows comes from these. For a
# posterior it is the field `sampled_probs` of `posterior.predict(x)`.


# %%
def predictors(seed):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, validation, test = order[:300], order[300:400], order[400:]
    flat = images.flatten(1)
    x, y = flat[train], labels[train]

    members = [point_estimate(x, y, seed + 100 * member) for member in range(MEMBERS)]
    held_back = DataLoader(TensorDataset(flat[validation], labels[validation]), batch_size=100)
    posteriors = {
        "Laplace, evidence": laplace(members[0], batches(x, y, seed)),
        "Laplace, validation": laplace(members[0], batches(x, y, seed), method="validation", loader=held_back),
        "noisy K-FAC": noisy_kfac(x, y, seed),
    }

    def of_networks(networks):
        def draws(inputs):
            with torch.no_grad():
                return torch.stack([model(inputs).softmax(-1) for model in networks])

        return draws

    def of_posterior(posterior):
        return lambda inputs: (
            posterior.predict(inputs, num_samples=DRAWS, generator=torch.Generator().manual_seed(seed)).sampled_probs
        )

    functions = {"point estimate": of_networks(members[:1]), "ensemble": of_networks(members)}
    functions |= {name: of_posterior(posterior) for name, posterior in posteriors.items()}
    return functions, test, posteriors


runs = [predictors(seed) for seed in SEEDS]
METHODS = list(runs[0][0])

# %% [markdown]
# ## The scores
#
# `bk.metrics` has the scores as functions of tensors. NLL and Brier score judge the probabilities as a whole, ECE the
# calibration alone, AURC the order of the confidences (smaller is better for these four). AUROC and FPR@95 are about
# telling the unseen eights and nines from the test images, by the entropy of the prediction.


# %%
def entropy(probs):
    return torch.special.entr(probs).sum(-1)


def scores(draws, test):
    probs, strange = draws(images[test].flatten(1)).mean(0), draws(unseen).mean(0)
    wrong = probs.argmax(-1) != labels[test]
    metrics = bk.metrics
    return {
        "accuracy": metrics.accuracy(probs, labels[test]),
        "NLL": metrics.categorical_nll(probs, labels[test]),
        "Brier": metrics.brier_score(probs, labels[test]),
        "ECE": metrics.expected_calibration_error(probs, labels[test], scheme="mass"),
        "AURC × 100": 100 * metrics.area_under_risk_coverage(wrong, probs.amax(-1)),
        "AUROC": metrics.auroc(entropy(strange), entropy(probs)),
        # the examples in distribution are the positives, as in most papers
        "FPR@95": metrics.false_positive_rate(-entropy(probs), -entropy(strange)),
    }


def table(rows):
    """Mean ± standard error over seeds; ``rows[method]`` is a list of dictionaries."""
    names = list(next(iter(rows.values()))[0])
    print(f"{'':20s}" + "".join(f"{name:>16s}" for name in names))
    for method, own in rows.items():
        cells = []
        for name in names:
            values = torch.tensor([float(row[name]) for row in own])
            error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
            cells.append(f"{values.mean():.3f} ± {error:.3f}")
        print(f"{method:20s}" + "".join(f"{cell:>16s}" for cell in cells))


table({method: [scores(functions[method], test) for functions, test, _ in runs] for method in METHODS})

# %% [markdown]
# Read this table with the standard errors in mind; they are over random splits and starts.
#
# - **There is little to mend in the point estimate on images like its own.** No NLL and no ECE is better by more than
#   a standard error. Digits are nearly separable, and 97 % of the answers are right.
# - **The evidence chooses a posterior that is far too broad here.** The accuracy stays, but the confidence is much
#   too low: the NLL is three times, the ECE twenty-five times that of the network alone. Whoever looks at accuracy
#   only would not notice. Validation data choose a prior under which little but the network is left.
# - **Noisy K-FAC orders its answers best.** Its AURC is the smallest and its AUROC the largest: it knows better
#   *which* answers to doubt. Over five splits the lead is one and a half to two standard errors; it is likely, not
#   certain. As probabilities its answers are too modest, which ECE and NLL count against it.
#
# ## Calibration as a picture
#
# Above the diagonal answers are better than they claim. Bins hold equal numbers of images.

# %%
functions, test, posteriors = runs[0]
probs = {method: functions[method](images[test].flatten(1)).mean(0) for method in METHODS}
figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
for ax, chosen in zip(axes, [METHODS[:2] + METHODS[4:], METHODS[2:4]], strict=True):
    for method in chosen:
        bk.plotting.plot_reliability(probs[method], labels[test], num_bins=10, scheme="mass", label=method, ax=ax)

# %% [markdown]
# ## Withholding answers
#
# The risk-coverage curve: answer only the most confident share of the images (horizontal); how many of these answers
# are wrong (vertical)? All seeds are pooled.

# %%
_, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for method in METHODS:
    pooled = [(functions[method](images[test].flatten(1)).mean(0), labels[test]) for functions, test, _ in runs]
    wrong = torch.cat([own.argmax(-1) != target for own, target in pooled])
    confidence = torch.cat([own.amax(-1) for own, _ in pooled])
    bk.plotting.plot_risk_coverage(wrong, confidence, label=method, ax=ax)

# %% [markdown]
# ## When the images change
#
# Now the test images are turned, step by step up to 75 degrees; the networks have seen none like these. This is where
# a point estimate gets it wrong with confidence.

# %%
ANGLES = [0, 45] if SMOKE else [0, 15, 30, 45, 60, 75]


def turned(angle):
    array = ndimage.rotate(images.numpy(), angle, axes=(2, 1), reshape=False, order=1)
    return torch.as_tensor(array).clamp(0, 1).flatten(1)


figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
measures = {
    "accuracy": bk.metrics.accuracy,
    "NLL / nats": bk.metrics.categorical_nll,
    "ECE": lambda own, target: bk.metrics.expected_calibration_error(own, target, scheme="mass"),
}
inputs = {angle: turned(angle) for angle in ANGLES}
for method in METHODS:
    predicted = [
        [(functions[method](inputs[angle][test]).mean(0), labels[test]) for angle in ANGLES]
        for functions, test, _ in runs
    ]
    for ax, (name, measure) in zip(axes, measures.items(), strict=True):
        values = torch.tensor([[float(measure(*pair)) for pair in row] for row in predicted])
        bk.plotting.plot_learning_curve(ANGLES, values, label=method, ax=ax)
        ax.set(xlabel="rotation / degrees", ylabel=name)
for ax in axes[1:]:
    ax.get_legend().remove()

# %% [markdown]
# The order turns round. Accuracy falls for all, at 30 degrees a little more for noisy K-FAC. The point estimate, the
# best calibrated at 0 degrees, is certain of wrong answers from 30 degrees on, and so are the ensemble and the
# Laplace fit whose prior came from unturned validation images: what is tuned on one distribution holds on that one.
# The two broad posteriors, too modest at home, have less than half the NLL from 45 degrees on. None is calibrated
# where only a fifth of the answers is right.
#
# ## Two kinds of doubt
#
# The entropy of the averaged probabilities splits into the mean entropy of the draws (*aleatoric*: every draw agrees
# that it could be two digits) and the mutual information (*epistemic*: the draws disagree). For a posterior both are
# fields of the prediction.

# %%
posterior = posteriors["noisy K-FAC"]
prediction = posterior.predict(images[test].flatten(1), num_samples=DRAWS, generator=torch.Generator().manual_seed(0))
strange = posterior.predict(unseen, num_samples=DRAWS, generator=torch.Generator().manual_seed(0))
for name, own in {"test images": prediction, "eights and nines": strange}.items():
    print(
        f"{name:17s} entropy {own.entropy.mean():.3f} = aleatoric {own.expected_entropy.mean():.3f}"
        f" + epistemic {own.mutual_information.mean():.3f}"
    )
for name in ("entropy", "expected_entropy", "mutual_information"):
    print(f"AUROC by {name:19s} {bk.metrics.auroc(getattr(strange, name), getattr(prediction, name)):.3f}")

# %% [markdown]
# The images with the most of each kind, among the test images and the eights and nines together; below each, the two
# most probable digits.

# %%
both = bk.prediction.concatenate([prediction, strange])
pictures = torch.cat([images[test], unseen.unflatten(1, (8, 8))])
truth = torch.cat([labels[test], torch.as_tensor(digits.target)[~known]])
rows = {"aleatoric": both.expected_entropy, "epistemic": both.mutual_information}
figure, axes = plt.subplots(2, 8, figsize=(11, 3.8), layout="constrained")
for row, (kind, doubt) in zip(axes, rows.items(), strict=True):
    for ax, index in zip(row, doubt.topk(8).indices, strict=True):
        ax.imshow(pictures[index].numpy(), cmap="gray_r", vmin=0, vmax=1)
        first, second = both.probs[index].topk(2).indices
        share = both.probs[index]
        ax.set_title(f"a {truth[index]}", fontsize="small")
        ax.set_xlabel(f"{first}: {share[first]:.0%}, {second}: {share[second]:.0%}", fontsize="small")
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(kind)

# %% [markdown]
# Both rows hold mostly what the posterior has never seen, and the first row holds nothing else. To a person these
# eights are not ambiguous; but the draws *agree* that such an image lies between the classes they know, and agreement
# counts as noise. So the split is the model's own: it says what more data *like the training set* would remove. For
# finding the unknown the entropy as a whole is the better score here, by the figures above. The second row also shows
# known digits in rare handwriting, of which more examples would help.
#
# ## What a closed form of the probabilities costs
#
# `predict(link=...)` replaces draws of the logits by a formula. For the Laplace fit by evidence, whose logits vary
# much:

# %%
broad = posteriors["Laplace, evidence"]
for link in ("mc", "probit", "extended_probit", "laplace_bridge"):
    own = broad.predict(images[test].flatten(1), link=link, num_samples=DRAWS).probs
    nll, ece = bk.metrics.categorical_nll(own, labels[test]), bk.metrics.expected_calibration_error(own, labels[test])
    print(f"{link:16s} NLL {nll:.3f}  ECE {ece:.3f}")

# %% [markdown]
# The bridge scores best because it all but ignores how broad this posterior is: a good score is not a good
# approximation. The page on predictions has the whole comparison.
#
# ## What to take home
#
# - Look at several scores. Accuracy, calibration and the order of the confidences are different things, and the
#   ranking of methods differs between them.
# - On data like the training set a well regularised small network can be calibrated already. A posterior earns its
#   keep where the data change, where answers may be withheld, and where the unknown should be noticed.
# - The breadth of a posterior (prior, temperature) decides about its calibration. Choose it with validation data that
#   look like what will come, and report what was chosen.
