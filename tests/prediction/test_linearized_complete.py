"""What a linearised prediction must see of a model: all uses of every weight, for every output, in every precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bayes_kfac import Posterior
from bayes_kfac.errors import UnsupportedModelError
from bayes_kfac.likelihoods import Gaussian
from tests.helpers import randn, rng, seeded
from tests.posteriors import FAMILIES, random_posterior


class Beside(nn.Module):
    """Uses its layer's weight beside calling the layer, in one of its outputs alone."""

    def __init__(self, output: int) -> None:
        super().__init__()
        self.layer, self.head, self.output = nn.Linear(3, 3), nn.Linear(3, 3), output

    def forward(self, x: Tensor) -> Tensor:
        outputs = list(self.head(self.layer(x).tanh()).unbind(1))
        outputs[self.output] = outputs[self.output] + (x @ self.layer.weight.mT)[:, 0]
        return torch.stack(outputs, dim=1)


def functions(posterior: Posterior, x: Tensor) -> list:
    return [
        lambda: posterior.predict(x),
        lambda: posterior.predict(x, output_covariance="diagonal", memory_budget=1),
        lambda: posterior.function_covariance(x),
        lambda: posterior.function_samples(x, 2),
    ]


@pytest.mark.parametrize("output", [0, 1, 2])
@pytest.mark.parametrize("call", range(4))
def test_weights_that_are_used_without_a_call_are_an_error(call, output):
    """A part of the variance would be missing without a word; whichever of the outputs it belongs to."""
    posterior = random_posterior(seeded(Beside(output)), Gaussian(0.5))
    for _ in range(2):  # the first call that fails is no reason to trust the second
        with pytest.raises(UnsupportedModelError, match=r"'layer' \(Linear\).*x @ module"):
            functions(posterior, randn(4, 3, seed=1))[call]()


def test_outputs_that_do_not_share_layers_are_complete():
    """Some of the layers are in the first output's gradient, some in the last's."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.right(x.tanh())], dim=1)

    posterior = random_posterior(seeded(Heads()), Gaussian(0.5))
    covariance = posterior.predict(randn(4, 3, seed=1)).epistemic_covariance
    assert bool((covariance.diagonal(dim1=-2, dim2=-1) > 1e-3).all())
    assert not covariance[:, 0, 1].any()


@pytest.mark.parametrize(("structure", "damping"), FAMILIES, ids=["-".join(names) for names in FAMILIES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype, structure, damping):
    """The model computes in its own precision, the Gaussian in single: as near as the model's rounding lets it be."""
    model = seeded(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    x = randn(5, 3, seed=1).to(dtype)
    low = random_posterior(model.to(dtype), Gaussian(0.5), structure=structure, damping=damping)
    draws = low.sample(6, generator=rng(0))
    results = {
        "mean": low.predict(x).mean,
        "covariance": low.predict(x).epistemic_covariance,
        "variance": low.predict(x, output_covariance="diagonal").epistemic_variance,
        "between": low.function_covariance(x, x[:2]),
        "samples": low.function_samples(x, draws=draws),
    }
    blocks = {name: block.to(torch.float64) for name, block in low.blocks.items()}
    high = Posterior(
        model.double(), Gaussian(0.5), blocks, prior_precision=low.prior_precision, provenance=low.provenance
    )
    expected = {
        "mean": high.predict(x.double()).mean,
        "covariance": high.predict(x.double()).epistemic_covariance,
        "variance": high.predict(x.double(), output_covariance="diagonal").epistemic_variance,
        "between": high.function_covariance(x.double(), x[:2].double()),
        "samples": high.function_samples(
            x.double(), draws=type(draws)({name: value.double() for name, value in draws.values.items()})
        ),
    }
    for name, value in expected.items():
        assert_close(results[name].double(), value, rtol=0.03, atol=0.03)
    assert results["covariance"].dtype == results["between"].dtype == torch.float32
    assert_close(results["covariance"], results["covariance"].mT, rtol=0, atol=1e-6)
