"""Embeddings: linear maps of one-hot inputs, which are never written out.

The block is ``(embedding, vocabulary)``, the transpose of the weight. Its input factor, the words' frequencies, is
diagonal: rows of one call are :class:`SparseRows`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kfac.curvature.modules.base import ModuleAdapter, register, register_like
from bayes_kfac.curvature.modules.linear import as_rows
from bayes_kfac.curvature.rows import SparseRows


@register(nn.Embedding)
class EmbeddingAdapter(ModuleAdapter):
    """``nn.Embedding`` on indices ``[batch, ...]``; the padding index has no gradient, and weighs nothing."""

    transposes = True
    sparse = True

    def input_rows(self, inputs: Tensor) -> SparseRows:  # noqa: D102
        indices = inputs.reshape(inputs.shape[0] if inputs.ndim else 1, -1, 1)
        weights = torch.ones(indices.shape, dtype=self.module.weight.dtype, device=indices.device)
        if self.module.padding_idx is not None:
            weights = weights * (indices != self.module.padding_idx)
        return SparseRows(indices, weights, self.module.num_embeddings)

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return as_rows(gradient)

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:  # noqa: D102
        return _obstacle(module)


def _is_lookup(module: nn.Module) -> bool:
    is_named_so = re.search("(ScaledWord|Positional)Embedding$", type(module).__name__) is not None
    return is_named_so and isinstance(module, nn.Embedding)


@register_like(_is_lookup)
class LookupAdapter(EmbeddingAdapter):
    """Embeddings of transformers that look up rows of their own choice and scale them, as in BART, OPT and Gemma.

    Which rows, and the scale, are what comes out for a weight of ones and for one of the rows' numbers.
    """

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Any:  # noqa: D102
        weight = self.module.weight
        numbers = torch.arange(
            len(weight), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        ).unsqueeze(1)
        scale = self._output_with(torch.ones_like(numbers).expand(weight.shape), args, kwargs)[..., 0]
        scaled = self._output_with(numbers.expand(weight.shape), args, kwargs)[..., 0]
        return (scaled / scale).round().long(), scale.to(weight.dtype)

    def input_rows(self, inputs: Any) -> SparseRows:  # noqa: D102
        indices, scale = inputs
        rows = super().input_rows(indices)
        return replace(rows, weights=rows.weights * scale.reshape(rows.weights.shape))


@register(nn.EmbeddingBag)
class EmbeddingBagAdapter(ModuleAdapter):
    """``nn.EmbeddingBag`` of mode ``"sum"`` or ``"mean"``: a row is the weighted sum of a bag's one-hot vectors."""

    transposes = True
    sparse = True

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Any:  # noqa: D102
        return dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | dict(kwargs)

    def input_rows(self, inputs: Mapping[str, Any]) -> SparseRows:  # noqa: D102
        bag, indices = self.module, inputs["input"]
        weights = inputs.get("per_sample_weights")
        weights = (
            torch.ones(indices.shape, dtype=bag.weight.dtype, device=indices.device) if weights is None else weights
        )
        if bag.padding_idx is not None:
            weights = weights * (indices != bag.padding_idx)
        if indices.ndim == 1:
            indices, weights = self._from_offsets(indices, weights, inputs["offsets"])
        if bag.mode == "mean":
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        return SparseRows(indices.unsqueeze(1), weights.unsqueeze(1), bag.num_embeddings)

    def gradient_rows(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return as_rows(gradient)

    def _from_offsets(self, indices: Tensor, weights: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Bags one after the other to ``[batch, longest]``, filled up with weights of 0."""
        starts = offsets[:-1] if self.module.include_last_offset else offsets
        positions = torch.arange(len(indices), device=indices.device)
        owner = torch.searchsorted(starts.contiguous(), positions, right=True) - 1
        place = positions - starts[owner]
        shape = (len(starts), int(place.max()) + 1 if len(place) else 1)
        padded, padded_weights = indices.new_zeros(shape), weights.new_zeros(shape)
        padded[owner, place], padded_weights[owner, place] = indices, weights
        return padded, padded_weights

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:  # noqa: D102
        return "its mode 'max' is not linear in the weights" if module.mode == "max" else _obstacle(module)


def _obstacle(module: Any) -> str | None:
    if module.sparse:
        return "its gradients are sparse; make it with sparse=False"
    if module.max_norm is not None:
        return "max_norm changes its weights in every forward pass"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True makes its gradients those of another loss"
    return None
