"""A whole optimizer step equals the same step written out with dense matrices, without hooks or Kronecker tricks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import bayes_kfac as bk
from bayes_kfac.structures import standard_normal

N, TAU, DELTA, GAMMA_EX, LR, DECAY, MOMENTUM, SIGMA = 50, 0.7, 1.3, 0.04, 0.05, 0.8, 0.6, 0.5


def two_layer_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(size, 2, generator=generator, dtype=torch.float64)


def blocks_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights with the bias as the last column."""
    return {
        name: torch.cat([model[int(name)].weight, model[int(name)].bias[:, None]], 1).detach().clone()
        for name in ("0", "2")
    }


def by_hand(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict, dict]:
    """Gradients of the mean loss, and the factors A and G, from the chain rule example by example."""
    out = 2
    gradient = {name: torch.zeros_like(w) for name, w in weights.items()}
    A = {"0": torch.zeros(4, 4).double(), "2": torch.zeros(5, 5).double()}
    G = {"0": torch.zeros(4, 4).double(), "2": torch.zeros(2, 2).double()}
    one = torch.ones(1, dtype=torch.float64)
    for x_n, y_n in zip(x, y, strict=True):
        a_0 = torch.cat([x_n, one])
        h = torch.tanh(weights["0"] @ a_0)
        a_1 = torch.cat([h, one])
        f = weights["2"] @ a_1
        residual = (f - y_n) / SIGMA**2
        back = weights["2"][:, :-1]
        gradient["2"] += torch.outer(residual, a_1) / len(x)
        gradient["0"] += torch.outer((back.T @ residual) * (1 - h**2), a_0) / len(x)
        A["0"] += torch.outer(a_0, a_0) / len(x)
        A["2"] += torch.outer(a_1, a_1) / len(x)
        for c in range(out):
            root = torch.eye(out, dtype=torch.float64)[c] / SIGMA
            g_0 = (back.T @ root) * (1 - h**2)
            G["2"] += torch.outer(root, root) / len(x)
            G["0"] += torch.outer(g_0, g_0) / len(x)
    return gradient, A, G


def dense_damped(A: Tensor, G: Tensor, gamma: float, damping: str) -> Tensor:
    if damping == "exact":
        return torch.kron(G, A) + gamma * torch.eye(len(A) * len(G), dtype=torch.float64)
    pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    eye_A, eye_G = torch.eye(len(A), dtype=torch.float64), torch.eye(len(G), dtype=torch.float64)
    return torch.kron(G + math.sqrt(gamma) / pi * eye_G, A + pi * math.sqrt(gamma) * eye_A)


@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_three_steps_equal_the_dense_formulas(damping: str) -> None:
    """Sample, statistics at the sample, moving averages, prior at the sample, both dampings, momentum, update."""
    model = two_layer_net()
    likelihood = bk.likelihoods.Gaussian(SIGMA).double()
    optimizer = bk.NoisyNaturalGradient(
        model,
        likelihood,
        num_data=N,
        lr=LR,
        damping=damping,
        fisher="exact",
        prior_precision=DELTA,
        temperature=TAU,
        extrinsic_damping=GAMMA_EX,
        momentum=MOMENTUM,
        statistics_decay=DECAY,
        statistics_every=1,
        inverse_every=1,
        warmup=False,
        kl_clip=None,
        generator=torch.Generator().manual_seed(3),
    )
    mean = blocks_of(model)
    gamma_in = TAU * DELTA / N
    averages: dict[str, tuple[Tensor, Tensor, float]] = {}
    momentum = {name: torch.zeros_like(w) for name, w in mean.items()}
    for step in range(3):
        x, y = data(step)
        with optimizer.sampled_params():
            sample = blocks_of(model)
            optimizer.zero_grad()
            likelihood(model(x), y).backward()
        optimizer.step()

        gradient, A, G = by_hand(sample, x, y)
        for name in mean:
            old_A, old_G, weight = averages.get(name, (torch.zeros_like(A[name]), torch.zeros_like(G[name]), 0.0))
            A_bar, G_bar = DECAY * old_A + (1 - DECAY) * A[name], DECAY * old_G + (1 - DECAY) * G[name]
            weight = DECAY * weight + (1 - DECAY)  # debiased: the weights of all batches sum to one
            averages[name] = (A_bar, G_bar, weight)
            prior_at_sample = gradient[name] + gamma_in * sample[name]
            momentum[name] = MOMENTUM * momentum[name] + (1 - MOMENTUM) * prior_at_sample
            debiased = momentum[name] / (1 - MOMENTUM ** (step + 1))
            matrix = dense_damped(A_bar / weight, G_bar / weight, gamma_in + GAMMA_EX, damping)
            direction = torch.linalg.solve(matrix, debiased.reshape(-1)).reshape(debiased.shape)
            mean[name] = mean[name] - LR * direction
            torch.testing.assert_close(blocks_of(model)[name], mean[name], rtol=0, atol=1e-10)
    # and the posterior has the intrinsic damping only: γ_ex must not leak into it
    for name, block in optimizer.posterior().blocks.items():
        A_bar, G_bar, weight = averages[name]
        expected = N / TAU * dense_damped(A_bar / weight, G_bar / weight, gamma_in, damping)
        torch.testing.assert_close(block.to_dense(), expected, rtol=1e-9, atol=1e-9)


def make(model: nn.Module, **options: object) -> bk.NoisyKFAC:
    defaults: dict = {"num_data": N, "fisher": "exact", "statistics_every": 1, "inverse_every": 1, "kl_clip": None}
    return bk.NoisyKFAC(model, bk.likelihoods.Gaussian(SIGMA).double(), **{**defaults, **options})


def run_step(optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> None:
    with optimizer.sampled_params():
        optimizer.zero_grad()
        optimizer.likelihood(optimizer.model(x), y).backward()
    optimizer.step()


def test_the_first_sample_is_the_mean_and_later_ones_are_posterior_samples() -> None:
    """Until statistics are in there is no noise; then the noise is the block's map of the generator's numbers."""
    generator = torch.Generator().manual_seed(1)
    model = two_layer_net()
    optimizer = make(model, generator=generator, warmup=False)
    before = blocks_of(model)
    with optimizer.sampled_params():
        assert all(torch.equal(value, before[name]) for name, value in blocks_of(model).items())
        optimizer.likelihood(model(data(0)[0]), data(0)[1]).backward()
    optimizer.step()
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    mean = blocks_of(model)
    with optimizer.sampled_params():
        sample = blocks_of(model)
    for name, block in optimizer.posterior().blocks.items():
        noise = block.sample(standard_normal(block, twin))
        torch.testing.assert_close(sample[name] - mean[name], noise, rtol=0, atol=1e-12)


def test_extrinsic_damping_leaves_the_noise_alone() -> None:
    """Two optimizers that differ in γ_ex only draw the same noise from the same statistics."""
    noises = []
    for gamma_ex in (0.0, 10.0):
        model = two_layer_net()
        optimizer = make(model, extrinsic_damping=gamma_ex, lr=0.0, generator=torch.Generator().manual_seed(5))
        run_step(optimizer, *data(0))
        mean = blocks_of(model)
        with optimizer.sampled_params():
            noises.append({name: value - mean[name] for name, value in blocks_of(model).items()})
    for name in noises[0]:
        assert torch.equal(noises[0][name], noises[1][name])
        assert noises[0][name].abs().max() > 0


def test_noise_scales_with_the_root_of_temperature_over_num_data() -> None:
    """At a negligible prior, a hundred times the data means a tenth of the noise (not a hundredth)."""
    noises = []
    for num_data in (100, 10_000):
        model = two_layer_net()
        optimizer = make(
            model,
            num_data=num_data,
            lr=0.0,
            # the prior shrinks with the data, so that γ_in is the same
            prior_precision=1e-6 * num_data,
            generator=torch.Generator().manual_seed(5),
            warmup=False,
        )
        run_step(optimizer, *data(0))
        mean = blocks_of(model)
        with optimizer.sampled_params():
            noises.append(blocks_of(model)["0"] - mean["0"])
    torch.testing.assert_close(noises[0], 10 * noises[1])


def test_warmup_is_the_plain_average_started_at_the_identity_on_every_step() -> None:
    """What training samples from has the factors of an average that is not debiased and starts at the identity."""
    model = two_layer_net()
    optimizer = make(model, statistics_decay=DECAY, damping="exact")
    A, G = torch.eye(5).double(), torch.eye(2).double()
    for step in range(4):
        x, y = data(step)
        with optimizer.sampled_params():
            sample = blocks_of(model)
            optimizer.zero_grad()
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
        _, batch_A, batch_G = by_hand(sample, x, y)
        A, G = DECAY * A + (1 - DECAY) * batch_A["2"], DECAY * G + (1 - DECAY) * batch_G["2"]
        dense = optimizer.blocks["2"].posterior.to_dense()
        torch.testing.assert_close(dense, N * torch.kron(G, A) + torch.eye(10).double(), rtol=1e-9, atol=1e-9)


def test_warmup_blends_towards_the_identity_as_an_average_started_there() -> None:
    """The Gaussian that training samples from has the factors of a plain average started at the identity."""
    model = two_layer_net()
    optimizer = make(model, warmup=True, statistics_decay=DECAY, lr=0.0, damping="exact")
    x, y = data(0)
    with optimizer.sampled_params():
        _, A, G = by_hand(blocks_of(model), x, y)
        optimizer.likelihood(model(x), y).backward()
    optimizer.step()
    started_there = [DECAY * torch.eye(4).double() + (1 - DECAY) * factor["0"] for factor in (G, A)]
    posterior = optimizer.blocks["0"].posterior
    assert posterior is not None
    torch.testing.assert_close(posterior.to_dense(), N * torch.kron(*started_there) + torch.eye(16).double())
    # what is returned as the posterior has no blend
    honest = N * torch.kron(G["0"], A["0"]) + torch.eye(16).double()
    torch.testing.assert_close(optimizer.posterior().blocks["0"].to_dense(), honest)


def test_kl_clip_bounds_the_length_of_a_step() -> None:
    """The step is scaled so that lr² dᵀ F̄ d is the bound, and left alone where it is shorter."""
    x, y = data(0)
    directions, factors = {}, {}
    for clip in (None, 1e-4, 1e4):
        model = two_layer_net()
        before = blocks_of(model)
        optimizer = make(model, kl_clip=clip, damping="exact", warmup=False)
        assert optimizer.clip_factor is None
        run_step(optimizer, x, y)
        factors[clip] = optimizer.clip_factor
        directions[clip] = {name: value - before[name] for name, value in blocks_of(model).items()}
    ratios = [directions[1e-4][name] / directions[None][name] for name in ("0", "2")]
    assert torch.allclose(ratios[0], ratios[0][0, 0].expand_as(ratios[0]))
    assert torch.allclose(ratios[1], ratios[0][0, 0].expand_as(ratios[1]))
    assert 0 < ratios[0][0, 0] < 1
    torch.testing.assert_close(ratios[0][0, 0], factors[1e-4])
    assert (factors[None], factors[1e4]) == (None, 1)
    for name in ("0", "2"):
        torch.testing.assert_close(directions[1e4][name], directions[None][name])
    clipped = {name: directions[1e-4][name].reshape(-1) for name in ("0", "2")}
    length = 0.0
    model = two_layer_net()
    optimizer = make(model, damping="exact", warmup=False)
    run_step(optimizer, x, y)
    for name, block in optimizer.posterior().blocks.items():
        length += float(clipped[name] @ (block.to_dense() / N) @ clipped[name])
    assert length == pytest.approx(1e-4, rel=1e-6)


def test_the_clip_may_be_set_on_the_way() -> None:
    """A smaller lr moves the weights as far as long as the clip holds; a smaller clip by its root less."""
    lengths = {}
    for lr, clip in ((0.1, 1e-4), (0.05, 1e-4), (0.1, 1e-6)):
        model = two_layer_net()
        before = blocks_of(model)
        optimizer = make(model, damping="exact", warmup=False)
        optimizer.param_groups[0]["lr"], optimizer.kl_clip = lr, clip
        run_step(optimizer, *data(0))
        assert optimizer.kl_clip == clip
        lengths[lr, clip] = (blocks_of(model)["0"] - before["0"]).norm()
    torch.testing.assert_close(lengths[0.05, 1e-4], lengths[0.1, 1e-4])
    torch.testing.assert_close(lengths[0.1, 1e-6], 0.1 * lengths[0.1, 1e-4])
    with pytest.raises(bk.errors.ArgumentError, match=r"kl_clip=-1\.0 is out of range"):
        optimizer.kl_clip = -1.0
    assert optimizer.kl_clip == 1e-6
    assert optimizer.clip_factor < 1
    optimizer.kl_clip = None
    run_step(optimizer, *data(0))
    assert optimizer.clip_factor is None


def test_statistics_and_step_do_not_depend_on_how_the_batch_is_split() -> None:
    """Two halves, each in its own context with half the loss, equal the whole batch in one."""
    x, y = data(0, 8)
    whole, halves = two_layer_net(), two_layer_net()
    optimizer_whole, optimizer_halves = make(whole, warmup=False), make(halves, warmup=False)
    run_step(optimizer_whole, x, y)
    optimizer_halves.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        with optimizer_halves.sampled_params():
            (optimizer_halves.likelihood(halves(x[part]), y[part]) / 2).backward()
    optimizer_halves.step()
    for name in ("0", "2"):
        torch.testing.assert_close(blocks_of(halves)[name], blocks_of(whole)[name], rtol=0, atol=1e-12)
        for factor in ("input", "gradient"):
            torch.testing.assert_close(
                optimizer_halves.blocks[name].statistics.mean(factor),
                optimizer_whole.blocks[name].statistics.mean(factor),
                rtol=0,
                atol=1e-12,
            )


def test_accumulation_inside_one_context_equals_the_whole_batch() -> None:
    """Several backward passes inside one context add up, gradients and statistics alike."""
    x, y = data(0, 8)
    whole, parts = two_layer_net(), two_layer_net()
    optimizer_whole, optimizer_parts = make(whole, warmup=False), make(parts, warmup=False)
    run_step(optimizer_whole, x, y)
    with optimizer_parts.sampled_params():
        for part in (slice(0, 2), slice(2, 8)):
            (optimizer_parts.likelihood(parts(x[part]), y[part]) * len(x[part]) / 8).backward()
    optimizer_parts.step()
    for name in ("0", "2"):
        torch.testing.assert_close(blocks_of(parts)[name], blocks_of(whole)[name], rtol=0, atol=1e-12)


def test_statistics_do_not_depend_on_the_losses_scale() -> None:
    """A loss multiplied by 1000, as by a gradient scaler, leaves the statistics bit for bit."""
    x, y = data(0)
    statistics = []
    for scale in (1.0, 1000.0):
        model = two_layer_net()
        optimizer = make(model, warmup=False)
        with optimizer.sampled_params():
            (scale * optimizer.likelihood(model(x), y)).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        optimizer.step()
        statistics.append(optimizer.blocks["0"].statistics)
    for name in ("input", "gradient"):
        assert torch.equal(statistics[0].mean(name), statistics[1].mean(name))


@pytest.mark.parametrize("antithetic", [False, True])
def test_several_samples_average_gradients_statistics_and_prior(antithetic: bool) -> None:
    """Contexts on one batch equal the averages of what each sample gives."""
    x, y = data(1)
    model = two_layer_net()
    options = {"num_samples": 2, "antithetic": antithetic, "warmup": False, "momentum": 0.0, "lr": 1e-2}
    optimizer = make(model, generator=torch.Generator().manual_seed(2), damping="exact", **options)
    optimizer.step(lambda: _closure(optimizer, *data(0)))
    reference = copy.deepcopy(blocks_of(model))
    samples = []
    for _ in range(2):
        with optimizer.sampled_params():
            samples.append(blocks_of(model))
            optimizer.zero_grad()
            optimizer.likelihood(model(x), y).backward()
    decay = optimizer.param_groups[0]["statistics_decay"]
    old = optimizer.blocks["0"].statistics
    optimizer.step()
    if antithetic:
        torch.testing.assert_close(samples[0]["0"] + samples[1]["0"], 2 * reference["0"])
    gradients, A, G = zip(*(by_hand(sample, x, y) for sample in samples), strict=True)
    mean_gradient = (gradients[0]["0"] + gradients[1]["0"]) / 2
    mean_sample = (samples[0]["0"] + samples[1]["0"]) / 2
    A_bar = (decay * old.mean("input") + (A[0]["0"] + A[1]["0"]) / 2) / (decay + 1)
    G_bar = (decay * old.mean("gradient") + (G[0]["0"] + G[1]["0"]) / 2) / (decay + 1)
    matrix = dense_damped(A_bar, G_bar, 1 / N, "exact")
    direction = torch.linalg.solve(matrix, (mean_gradient + mean_sample / N).reshape(-1)).reshape(4, 4)
    torch.testing.assert_close(blocks_of(model)["0"], reference["0"] - 1e-2 * direction, rtol=0, atol=1e-10)


def _closure(optimizer: bk.NoisyKFAC, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = optimizer.likelihood(optimizer.model(x), y)
    loss.backward()
    return loss


def test_closure_and_plain_loop_are_the_same_step() -> None:
    """``step(closure)`` opens the context itself, once for each sample, and returns the mean loss."""

    def train(use_closure: bool) -> tuple[dict[str, Tensor], list[float]]:
        model = two_layer_net()
        optimizer = make(model, num_samples=3, generator=torch.Generator().manual_seed(9))
        losses = []
        for step in range(3):
            x, y = data(step)
            if use_closure:
                losses.append(optimizer.step(lambda x=x, y=y: _closure(optimizer, x, y)).item())
            else:
                parts = []
                for _ in range(3):
                    with optimizer.sampled_params():
                        parts.append(_closure(optimizer, x, y).item())
                optimizer.step()
                losses.append(sum(parts) / 3)
        return blocks_of(model), losses

    results = [train(use_closure) for use_closure in (True, False)]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12)
    for name in ("0", "2"):
        assert torch.equal(results[0][0][name], results[1][0][name])


def test_the_decay_counts_steps_not_measurements() -> None:
    """With a measurement on steps 0, 1, 2 and 4, the old average keeps the decay to the power of the steps between."""
    model = two_layer_net()
    optimizer = make(model, statistics_every=4, statistics_decay=DECAY, lr=0.0)
    measured: dict[int, Tensor] = {}
    for step in range(5):
        x, y = data(step)
        with optimizer.sampled_params():
            sample = blocks_of(model)
            optimizer.zero_grad()
            optimizer.likelihood(model(x), y).backward()
        optimizer.step()
        measured[step] = by_hand(sample, x, y)[2]["0"]
    average, weight = torch.zeros(4, 4).double(), 0.0
    for step, keep in ((0, DECAY), (1, DECAY), (2, DECAY), (4, DECAY**2)):
        average, weight = keep * average + (1 - keep) * measured[step], keep * weight + (1 - keep)
    statistics = optimizer.blocks["0"].statistics
    torch.testing.assert_close(statistics.mean("gradient"), average / weight, rtol=0, atol=1e-12)


def test_with_warmup_the_first_sample_is_that_of_the_identity() -> None:
    """Before any data the factors are the identity's: noise of scale ``1/sqrt(N + δ)``, not the prior's."""
    model = two_layer_net()
    optimizer = make(model, damping="exact", generator=torch.Generator().manual_seed(1))
    twin = torch.Generator().manual_seed(1)
    mean = blocks_of(model)
    with optimizer.sampled_params():
        sample = blocks_of(model)
    for name in mean:
        noise = torch.randn(mean[name].shape, dtype=torch.float64, generator=twin)
        torch.testing.assert_close(sample[name] - mean[name], noise / math.sqrt(N + 1.0))
