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
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.low_rank import MFacStructure, SlangStructure, SmwStructure, TongaStructure
from bayes_kfac.structures.low_rank_factors import SketchyStructure, SkfacStructure
from bayes_kfac.structures.low_rank_gaussian import LowRankGaussian
from bayes_kfac.structures.low_rank_kron import LowRankKroneckerGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
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
    "KroneckerEigenGaussian",
    "KroneckerStructure",
    "LowRankGaussian",
    "LowRankKroneckerGaussian",
    "MFacStructure",
    "MatrixNormalGaussian",
    "Prior",
    "SketchyStructure",
    "SkfacStructure",
    "SlangStructure",
    "SmwStructure",
    "Structure",
    "TongaStructure",
    "Whitened",
    "available",
    "build",
    "gaussian_from_state",
    "get",
    "register",
    "register_gaussian",
    "standard_normal",
]
