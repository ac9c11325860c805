"""Surrogates for BoTorch: posteriors of your own network as ``botorch.models.model.Model``.

:class:`LinearizedSurrogate` has joint Gaussians in closed form, and can be conditioned on observations;
:class:`SampledSurrogate` has draws of the weights. Both are differentiable in the inputs, and speak BoTorch's shapes:
inputs ``batch_shape x q x d``, outputs ``batch_shape x q x m``. Needs the extra ``bayes-kfac[botorch]``.
"""

try:
    import botorch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"bayes_kfac.botorch needs BoTorch, and {error.name} is not installed: pip install 'bayes-kfac[botorch]'",
        name=error.name,
    ) from error

from bayes_kfac.botorch.linearized import LinearizedSurrogate
from bayes_kfac.botorch.sampled import SampledSurrogate

__all__ = ["LinearizedSurrogate", "SampledSurrogate"]
