"""``fit`` trains on real data, reports the evidence lower bound, and leaves the model as it should."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, TensorDataset

import bayes_kfac as bk
from bayes_kfac.errors import ArgumentError, TargetError
from bayes_kfac.training.schedules import WhileAlike


def diabetes():
    x, y = (torch.as_tensor(array, dtype=torch.float32) for array in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)


def loader(x, y, seed=0, batch_size=32):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True, generator=generator)


def regression_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1))


def test_regression_on_diabetes_beats_the_mean_and_is_calibrated():
    """The held-out error is that of a good regression, the interval holds about what it should."""
    x, y = diabetes()
    states = []
    posterior = bk.fit(
        regression_net(),
        bk.likelihoods.Gaussian("learned"),
        loader(x[:340], y[:340]),
        epochs=30,
        lr=3e-2,
        progress=False,
        callbacks=[states.append],
        generator=torch.Generator().manual_seed(0),
    )
    prediction = posterior.predict(x[340:])
    error = (prediction.mean - y[340:]).square().mean().sqrt()
    lower, upper = prediction.interval(0.9)
    inside = ((y[340:] >= lower) & (y[340:] <= upper)).float().mean()
    assert error < 0.8  # the mean alone has 1.0, least squares about 0.71
    assert 0.8 < inside < 1.0
    assert len(states) == 30
    assert states[-1].elbo > states[0].elbo
    assert all(math.isfinite(state.elbo) for state in states)
    assert states[-1].elbo == pytest.approx(-340 * states[-1].nll - states[-1].kl)


def test_classification_on_digits_with_a_convolution():
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.as_tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    posterior = bk.fit(
        model,
        bk.likelihoods.Categorical(),
        loader(x[:1200], y[:1200], batch_size=64),
        epochs=10,
        lr=0.1,
        statistics_every=2,
        inverse_every=20,
        statistics_decay=0.98,
        progress=False,
        generator=torch.Generator().manual_seed(0),
    )
    for method in ("linearized", "sampling"):
        prediction = posterior.predict(x[1200:], method, generator=torch.Generator().manual_seed(0))
        assert (prediction.probs.argmax(-1) == y[1200:]).float().mean() > 0.85
        torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(len(x) - 1200))


def test_the_same_seeds_give_the_same_posterior():
    x, y = diabetes()
    posteriors = [
        bk.fit(
            regression_net(),
            bk.likelihoods.Gaussian("learned"),
            loader(x, y, seed=3),
            epochs=2,
            progress=False,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    ]
    for name, value in posteriors[0].mean.items():
        assert torch.equal(value, posteriors[1].mean[name])


def test_callbacks_can_end_the_training_and_all_of_them_are_called():
    x, y = diabetes()
    seen = []
    bk.fit(
        regression_net(),
        bk.likelihoods.Gaussian(1.0),
        loader(x, y),
        epochs=10,
        progress=False,
        callbacks=[lambda state: state.epoch == 2, lambda state: seen.append(state.epoch)],
    )
    assert seen == [1, 2]


def test_the_model_is_left_at_the_mean_in_its_own_mode():
    x, y = diabetes()
    model = regression_net().eval()
    posterior = bk.fit(model, bk.likelihoods.Gaussian(1.0), loader(x, y), epochs=1, progress=False)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, posterior.mean[name])


def test_every_module_is_left_in_its_own_mode():
    """Dropout that is kept on in a network at rest, and what was frozen in one that trains; after an error too."""
    x, y = diabetes()
    for batches in (loader(x, y), [(x, y), (x, y[:, 0])]):
        for mode in (True, False):
            model = nn.Sequential(nn.Linear(10, 20), nn.Dropout(), nn.Linear(20, 1)).train(mode)
            model[1].train(not mode)
            modes = [own.training for own in model.modules()]
            with pytest.raises(TargetError) if isinstance(batches, list) else nullcontext():
                bk.fit(model, bk.likelihoods.Gaussian(1.0), batches, epochs=1, num_data=442, progress=False)
            assert [own.training for own in model.modules()] == modes


def test_counts_may_be_numpys(tmp_path):
    """As they come from a search over arrays: training, predictions and files are those of Python's integers."""
    x, y = diabetes()
    found = []
    for kind in (int, np.int64):
        posterior = bk.fit(
            regression_net(),
            bk.likelihoods.Gaussian(0.5),
            [(x[:32], y[:32])],
            epochs=kind(3),
            num_data=kind(32),
            num_samples=kind(2),
            statistics_every=WhileAlike(most=kind(2)),
            inverse_every=kind(1),
            progress=False,
            generator=torch.Generator().manual_seed(0),
        )
        posterior.save(tmp_path / "posterior.safetensors")
        again = bk.Posterior.load(tmp_path / "posterior.safetensors", regression_net())
        assert type(again.provenance.num_data) is int
        found.append(again.predict(x, num_samples=kind(4), memory_budget=kind(1000)).variance)
    assert torch.equal(*found)


def test_a_data_set_in_the_place_of_a_loader_is_refused():
    """It yields single examples; that ``num_data`` is missing would lead astray."""
    with pytest.raises(ArgumentError, match=r"TensorDataset.*DataLoader\("):
        bk.fit(regression_net(), bk.likelihoods.Gaussian(1.0), loader(*diabetes()).dataset, epochs=1, progress=False)


@pytest.mark.parametrize("kind", [tuple, list])
def test_tensors_in_the_place_of_a_loader_are_refused(kind):
    """They are what a loader is made of; that ``num_data`` is missing would lead astray."""
    with pytest.raises(ArgumentError, match=rf"loader is a {kind.__name__} of tensors.*DataLoader\(TensorDataset\("):
        bk.fit(regression_net(), bk.likelihoods.Gaussian(1.0), kind(diabetes()), epochs=1, progress=False)


def test_a_chain_of_streams_without_a_length_needs_num_data():
    """It has a ``len()``, which raises."""

    class Stream(IterableDataset):
        def __iter__(self):
            return zip(*diabetes(), strict=True)

    batches = DataLoader(ChainDataset([Stream()]), batch_size=50)
    with pytest.raises(ArgumentError, match=r"no dataset with a length\. Pass num_data="):
        bk.fit(regression_net(), bk.likelihoods.Gaussian(1.0), batches, epochs=1, progress=False)


def test_num_data_must_be_known():
    x, y = diabetes()
    with pytest.raises(ArgumentError, match="num_data=None"):
        bk.fit(regression_net(), bk.likelihoods.Gaussian(1.0), [(x[:8], y[:8])], epochs=1, progress=False)
    posterior = bk.fit(
        regression_net(), bk.likelihoods.Gaussian(1.0), [(x[:8], y[:8])], epochs=1, num_data=442, progress=False
    )
    assert posterior.provenance.num_data == 442


def test_an_empty_loader_is_named():
    x, y = diabetes()
    for batches in ([], [(x[:0], y[:0])]):
        with pytest.raises(ArgumentError, match="yielded no example"):
            bk.fit(regression_net(), bk.likelihoods.Gaussian(1.0), batches, epochs=1, num_data=5, progress=False)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_batches_without_examples_are_skipped(fisher):
    """As filters make them: nothing of the training changes."""
    x, y = diabetes()
    batches, states = [(x[:20], y[:20]), (x[20:32], y[20:32])], []
    for given in (batches, [(x[:0], y[:0]), batches[0], (x[:0], y[:0]), batches[1]]):
        bk.fit(
            regression_net(),
            bk.likelihoods.Gaussian(1.0),
            given,
            epochs=2,
            num_data=32,
            fisher=fisher,
            callbacks=[states.append],
            progress=False,
            generator=torch.Generator().manual_seed(0),
        )
    assert [state.elbo for state in states[:2]] == [state.elbo for state in states[2:]]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), [0.02, 0.01, 0.005]),
        # by ``nll``: with a threshold that no epoch reaches, every one after the first is a plateau
        (
            partial(
                torch.optim.lr_scheduler.ReduceLROnPlateau,
                factor=0.5,
                patience=0,
                threshold=1e3,
                threshold_mode="abs",
            ),
            [0.04, 0.02, 0.01],
        ),
    ],
    ids=["by epochs", "on a plateau"],
)
def test_another_schedule_can_be_given(scheduler, expected):
    x, y = diabetes()
    rates = []
    bk.fit(
        regression_net(),
        bk.likelihoods.Gaussian(1.0),
        loader(x, y),
        epochs=3,
        lr=0.04,
        progress=False,
        scheduler=scheduler,
        callbacks=[lambda state: rates.append(state.optimizer.param_groups[0]["lr"])],
    )
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("callbacks", [print, [print, None], (state for state in [print]), None])
def test_callbacks_are_a_list_of_functions(callbacks):
    """Which is said before the training."""
    x, y = diabetes()
    model = regression_net()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ArgumentError, match=r"^callbacks=.*Allowed: a list of functions"):
        bk.fit(model, bk.likelihoods.Gaussian(1.0), loader(x, y), epochs=1, progress=False, callbacks=callbacks)
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def test_the_progress_bar_shows_the_parts_of_the_bound(capsys):
    x, y = diabetes()
    bk.fit(regression_net(), bk.likelihoods.Gaussian(1.0), loader(x, y), epochs=1, progress=True)
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("nll=", "kl=", "elbo="))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_train_with_factors_of_at_least_float32(dtype):
    x, y = diabetes()
    model = regression_net().to(dtype)
    posterior = bk.fit(
        model,
        bk.likelihoods.Gaussian(1.0).to(dtype),
        loader(x.to(dtype), y.to(dtype)),
        epochs=1,
        progress=False,
    )
    factors = posterior.blocks["0"].state["scale_tril_row"]
    assert factors.dtype == torch.promote_types(dtype, torch.float32)
    prediction = posterior.predict(x[:5].to(dtype), "sampling")
    assert bool(torch.isfinite(prediction.mean).all())
    assert posterior.mean["0.weight"].dtype == dtype


@pytest.mark.parametrize("tune", [None, "marginal_likelihood"])
def test_a_layer_that_no_pass_uses_is_named_after_the_first(tune):
    """Not after all epochs; the model is whole, in its mode, at finite weights that the next call may start from."""

    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.idle = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(2, 2)

        def forward(self, x):
            passes.append(len(x))
            return self.used(x)

    passes = []
    model = Forgetful().eval()
    start = model.unused.weight.detach().clone()
    data = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(2)]
    options = {"num_data": 16, "epochs": 50, "tune": tune, "progress": False}
    with pytest.raises(bk.errors.UsageError, match=r"'unused' has no curvature.*requires_grad_\(False\)"):
        bk.fit(model, bk.likelihoods.Gaussian(0.5), data, **options)
    assert len(passes) == 1
    assert not model.training
    assert torch.equal(model.unused.weight, start)  # at the mean, without the noise of a sample
    for name in ("idle", "unused"):  # the remedy that the message names
        model.get_submodule(name).requires_grad_(False)
    posterior = bk.fit(model, bk.likelihoods.Gaussian(0.5), data, **(options | {"epochs": 2}))
    assert list(posterior.blocks) == ["used"]
