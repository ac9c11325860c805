"""Structures: from a layer's statistics to a Gaussian over its weights. Each is one file and one registry line."""

from bayes_kfac.structures.base import (
    DAMPING_KINDS,
    BlockGaussian,
    BlockSpec,
    Card,
    Information,
    Prior,
    Structure,
    available,
    build,
    gaussian_from_state,
    get,
    register,
    register_gaussian,
    standard_normal,
)
from bayes_kfac.structures.dense import DenseGaussian, DenseStructure
from bayes_kfac.structures.diagonal import DiagonalGaussian, DiagonalStructure
from bayes_kfac.structures.inverse_free import (
    InverseFreeKFACStructure,
    InverseFreeStructure,
    StructuredInverseFreeStructure,
)
from bayes_kfac.structures.kbfgs import KBFGSStructure
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
from bayes_kfac.structures.psgd import PSGDStructure
from bayes_kfac.structures.whitened import Whitened

__all__ = [
    "DAMPING_KINDS",
    "BlockGaussian",
    "BlockSpec",
    "Card",
    "DenseGaussian",
    "DenseStructure",
    "DiagonalGaussian",
    "DiagonalStructure",
    "Information",
    "InverseFreeKFACStructure",
    "InverseFreeStructure",
    "KBFGSStructure",
    "KroneckerEigenGaussian",
    "KroneckerStructure",
    "MatrixNormalGaussian",
    "PSGDStructure",
    "Prior",
    "Structure",
    "StructuredInverseFreeStructure",
    "Whitened",
    "available",
    "build",
    "gaussian_from_state",
    "get",
    "register",
    "register_gaussian",
    "standard_normal",
]
