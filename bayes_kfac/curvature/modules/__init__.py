"""Adapters: how each kind of module maps onto blocks. One file for each family of kinds."""

from bayes_kfac.curvature.modules.attention import MultiheadAttentionAdapter
from bayes_kfac.curvature.modules.base import (
    CompositeAdapter,
    Modes,
    ModuleAdapter,
    Record,
    adapter_for,
    register,
    register_like,
)
from bayes_kfac.curvature.modules.convolution import ConvAdapter, ConvTransposeAdapter
from bayes_kfac.curvature.modules.embedding import EmbeddingAdapter, EmbeddingBagAdapter
from bayes_kfac.curvature.modules.linear import (
    LinearAdapter,
    LinearWithoutBiasAdapter,
    TransposedLinearAdapter,
)
from bayes_kfac.curvature.modules.normalization import NormalizationAdapter, couples_examples
from bayes_kfac.curvature.modules.parameter import ParameterAdapter
from bayes_kfac.curvature.modules.recurrent import CellAdapter, RecurrentAdapter

__all__ = [
    "CellAdapter",
    "CompositeAdapter",
    "ConvAdapter",
    "ConvTransposeAdapter",
    "EmbeddingAdapter",
    "EmbeddingBagAdapter",
    "LinearAdapter",
    "LinearWithoutBiasAdapter",
    "Modes",
    "ModuleAdapter",
    "MultiheadAttentionAdapter",
    "NormalizationAdapter",
    "ParameterAdapter",
    "Record",
    "RecurrentAdapter",
    "TransposedLinearAdapter",
    "adapter_for",
    "couples_examples",
    "register",
    "register_like",
]
