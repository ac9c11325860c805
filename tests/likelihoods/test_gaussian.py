"""The Gaussian likelihood against SciPy, and the broadcasting that it must refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.testing import assert_close

from bayes_kfac.errors import ArgumentError, BayesKfacError, TargetError
from bayes_kfac.likelihoods import FixedNoise, GammaNoise, Gaussian, LearnedNoise

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def data(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output, target = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return output, target


# The criterion against SciPy

SCALES = [
    ((5,), 0.7),
    ((5, 1), 0.7),
    ((5, 3), 0.7),
    ((5, 3), [0.3, 1.0, 2.0]),
    ((5, 2, 3), [0.3, 1.0, 2.0]),
    ((5, 2, 3), [[0.3], [1.5]]),
    ((5, 2, 3), [[0.3, 0.4, 0.5], [1.5, 1.6, 1.7]]),
]


@pytest.mark.parametrize(("shape", "scale"), SCALES)
@pytest.mark.parametrize("noise", [FixedNoise, LearnedNoise])
def test_loss_is_scipys(
    noise: type[FixedNoise | LearnedNoise], shape: tuple[int, ...], scale: float | list[float]
) -> None:
    """Scalar, per-output and broadcast noise: the mean over the batch of the summed negative log-densities."""
    output, target = data(*shape)
    expected = -stats.norm.logpdf(target.numpy(), output.numpy(), np.array(scale)).reshape(shape[0], -1).sum(1)
    likelihood = Gaussian(noise(double(scale)))
    assert_close(likelihood.negative_log_likelihood(output, target), torch.as_tensor(expected), **TIGHT)
    assert_close(likelihood(output, target).detach(), torch.as_tensor(expected.mean()), **TIGHT)
    density = stats.norm.logpdf(target.numpy(), output.numpy(), np.array(scale))
    assert_close(likelihood.distribution(output).log_prob(target), torch.as_tensor(density), **TIGHT)


def test_loss_with_a_belief_is_the_integral_over_the_precision() -> None:
    """``E_q[−log N(y; f, 1/τ)]`` by quadrature over ``τ ~ Gamma``, for scalar and per-output beliefs."""
    output, target = data(4, 2)
    for shape, rates in (((), 2.5), ((2,), [2.5, 0.4])):
        noise = GammaNoise(6.0, 6.0, shape).double()
        with torch.no_grad():
            noise.log_concentration.fill_(math.log(3.5))
            noise.log_rate.copy_(double(rates).log())
        losses = Gaussian(noise).negative_log_likelihood(output, target)
        for n in range(4):
            expected = sum(
                expected_loss(float(output[n, k] - target[n, k]), 3.5, float(np.broadcast_to(rates, 2)[k]))
                for k in range(2)
            )
            assert losses[n].item() == pytest.approx(expected, rel=1e-9)


def expected_loss(residual: float, concentration: float, rate: float) -> float:
    belief = stats.gamma(concentration, scale=1 / rate)

    def integrand(precision: float) -> float:
        return -stats.norm.logpdf(residual, scale=precision**-0.5) * belief.pdf(precision)

    return integrate.quad(integrand, 0, np.inf, epsabs=1e-13, epsrel=1e-12, limit=400)[0]


# Gradients and Fisher


def test_target_gradient_is_residual_times_precision() -> None:
    output, target = data(5, 3)
    scale = double([0.3, 1.0, 2.0])
    assert_close(Gaussian(scale).target_gradient(output, target), (output - target) / scale**2, **TIGHT)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (5, 2, 3)])
def test_fisher_is_the_precision(shape: tuple[int, ...]) -> None:
    """One column for each output, ``e_k / σ_k``."""
    output, _ = data(*shape)
    scale = double([0.3, 1.0, 2.0]) if shape[-1] == 3 else double(0.6)
    columns = Gaussian(scale).fisher_root(output)
    size = math.prod(shape[1:])
    flat = columns.reshape(len(columns), shape[0], -1)
    expected = torch.diag(scale.expand(shape[1:]).reshape(-1) ** -2).expand(shape[0], size, size)
    assert_close(torch.einsum("cbi,cbj->bij", flat, flat), expected, **TIGHT)


def test_fisher_with_a_belief_takes_the_expected_precision() -> None:
    """``E[1/σ²] = concentration / rate``, not the inverse of the expected variance."""
    output, _ = data(5, 1)
    columns = Gaussian(GammaNoise(6.0, 3.0)).double().fisher_root(output)
    assert_close(columns.square(), torch.full((1, 5, 1), 2.0, dtype=torch.float64), rtol=1e-6, atol=0.0)


# noise_scale


@pytest.mark.parametrize(
    ("noise_scale", "expected"),
    [
        (0.5, 0.5),
        (torch.tensor(0.5, dtype=torch.float64), 0.5),
        ([0.5, 2.0], [0.5, 2.0]),
        (torch.tensor(2), 2.0),
        (np.float64(0.5), 0.5),
        ("learned", 1.0),
        (LearnedNoise(0.25), 0.25),
        (GammaNoise(5.0, 1.0), 0.5),
    ],
)
def test_noise_scale_is_in_the_targets_units(noise_scale: object, expected: object) -> None:
    """The root of the expected variance; numbers, lists, integer tensors and NumPy scalars are all welcome."""
    likelihood = Gaussian(noise_scale)
    assert not likelihood.noise_scale.requires_grad
    assert_close(likelihood.noise_scale.double(), double(expected), rtol=1e-6, atol=0.0)
    shape = (4, *likelihood.noise_scale.shape)
    assert torch.isfinite(likelihood(torch.zeros(shape), torch.ones(shape)))


def test_only_learned_noise_has_parameters() -> None:
    counts = [len(list(Gaussian(noise).parameters())) for noise in (0.5, "learned", GammaNoise())]
    assert counts == [0, 1, 2]


@pytest.mark.parametrize(
    "noise_scale",
    [0, 0.0, -1.0, math.nan, math.inf, [1.0, 0.0], torch.tensor([1.0, -2.0]), torch.tensor(math.nan), None, []],
)
def test_impossible_noise_scale_is_refused(noise_scale: object) -> None:
    """The error names the argument and its value, and is a ``ValueError``."""
    for build in (Gaussian, LearnedNoise, FixedNoise):
        with pytest.raises(ArgumentError, match=r"noise_scale=.*Allowed") as caught:
            build(noise_scale)
        assert isinstance(caught.value, BayesKfacError)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("noise_scale", [[0.5, 2.0], np.array([0.5, 2.0]), np.float32(0.5), np.array(0.5)])
def test_noise_scales_may_be_lists_and_arrays(noise_scale: Any) -> None:
    expected = torch.tensor(np.asarray(noise_scale), dtype=torch.float32)
    assert_close(Gaussian(noise_scale).noise_scale, expected)
    assert_close(LearnedNoise(noise_scale).variance().detach(), expected**2)


def test_misspelt_noise_scale_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"noise_scale='learnt' is unknown.*'learned'"):
        Gaussian("learnt")


@pytest.mark.parametrize(("concentration", "rate"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_impossible_belief_is_refused(concentration: float, rate: float) -> None:
    with pytest.raises(ArgumentError, match=r"(concentration|rate)="):
        GammaNoise(concentration, rate)


# What does not fit


def test_targets_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(TargetError, match=r"of type ndarray must be a tensor: torch.as_tensor"):
        Gaussian(1.0)(torch.zeros(4, 1), np.zeros((4, 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "target"), [((4,), (4, 1)), ((4, 1), (4,)), ((4, 2), (4, 1)), ((4, 1), (1, 1)), ((4, 2, 3), (4, 3, 2))]
)
def test_targets_never_broadcast(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    """``(n,)`` against ``(n, 1)`` is the silent ``n × n`` loss; it is refused, with the reshape that mends it."""
    with pytest.raises(TargetError, match="must be equal") as caught:
        Gaussian(1.0)(torch.zeros(output), torch.zeros(target))
    assert isinstance(caught.value, ValueError)
    assert ("target.reshape" in str(caught.value)) == (math.prod(output) == math.prod(target))
    with pytest.raises(TargetError):
        Gaussian(1.0).target_gradient(torch.zeros(output), torch.zeros(target))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integer_targets_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TargetError, match=r"must be floating point.*target\.to\("):
        Gaussian(1.0)(torch.zeros(4, 1), torch.zeros(4, 1, dtype=dtype))


@pytest.mark.parametrize("noise", [FixedNoise, LearnedNoise, lambda scale: GammaNoise(6.0, 6.0, tuple(scale.shape))])
@pytest.mark.parametrize(
    ("shape", "noise_shape"),
    [((4, 1), (5,)), ((4,), (4,)), ((4, 3), (4, 1)), ((4, 3), (2,)), ((4, 3), (4, 3)), ((4, 3), (1, 1, 3))],
)
def test_noise_never_broadcasts_the_output(
    noise: type[FixedNoise], shape: tuple[int, ...], noise_shape: tuple[int, ...]
) -> None:
    """Scales of another shape than one example's output would widen the loss, or differ between examples."""
    likelihood = Gaussian(noise(torch.ones(noise_shape)))
    output = torch.zeros(shape)
    with pytest.raises(TargetError, match="noise"):
        likelihood(output, torch.zeros(shape))
    with pytest.raises(TargetError, match="noise"):
        likelihood.sample_gradient(output, 1, None)
    with pytest.raises(TargetError, match="noise"):
        likelihood.fisher_root(output)


@pytest.mark.parametrize("noise", [FixedNoise, LearnedNoise, lambda scale: GammaNoise(6.0, 6.0, tuple(scale.shape))])
def test_noise_on_another_device_is_named(noise: type[FixedNoise]) -> None:
    """A model was moved, and its likelihood was not; a number on the CPU need not be."""
    output = torch.zeros(4, 3, device="meta")
    with pytest.raises(TargetError, match=r"=Gaussian\(.*is on cpu, and the model's output on meta.*\.to\('meta'\)"):
        Gaussian(noise(torch.ones(3)))(output, output)
    assert Gaussian(noise(torch.ones(3))).to("meta")(output, output).is_meta
    assert Gaussian(noise(torch.ones(())))(output, output).is_meta
    with pytest.raises(TargetError, match="is on meta, and the model's output on cpu"):
        Gaussian(noise(torch.ones(()))).to("meta")(torch.zeros(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(("shape", "noise_shape"), [((4,), (1,)), ((4, 3), (1, 3)), ((4, 3), (1, 1)), ((4, 1), (1,))])
def test_noise_may_have_a_batch_dimension_of_one(shape: tuple[int, ...], noise_shape: tuple[int, ...]) -> None:
    """A scale written ``[0.5]`` for outputs ``(n,)`` changes nothing."""
    output, target = data(*shape)
    likelihood, plain = Gaussian(torch.full(noise_shape, 0.5)), Gaussian(0.5)
    assert torch.equal(likelihood(output, target), plain(output, target))
    assert torch.equal(likelihood.fisher_root(output), plain.fisher_root(output))
    assert_close(likelihood.distribution(output).log_prob(target), plain.distribution(output).log_prob(target))
