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
    gaussian_from_state,
    get,
    preconditioners,
    register,
    register_gaussian,
    standard_normal,
)
from bayes_kfac.structures.chain import ChainGaussian
from bayes_kfac.structures.dense import DenseGaussian, DenseStructure
from bayes_kfac.structures.diagonal import DiagonalGaussian, DiagonalStructure
from bayes_kfac.structures.ekfac import EKFACStructure, TEKFACStructure
from bayes_kfac.structures.eva import EvaStructure
from bayes_kfac.structures.foof import FOOFStructure
from bayes_kfac.structures.inverse_free import (
    InverseFreeKFACStructure,
    InverseFreeStructure,
    StructuredInverseFreeStructure,
)
from bayes_kfac.structures.joint import JointGaussian, build, correlation, measure
from bayes_kfac.structures.kbfgs import KBFGSStructure
from bayes_kfac.structures.kpsvd import (
    KFACCorrectedStructure,
    KPSVDDeflationStructure,
    KPSVDLanczosStructure,
    KPSVDStructure,
)
from bayes_kfac.structures.kron import KroneckerStructure
from bayes_kfac.structures.kron_eigen import KroneckerEigenGaussian
from bayes_kfac.structures.link import Link
from bayes_kfac.structures.low_rank import MFacStructure, SlangStructure, SmwStructure, TongaStructure
from bayes_kfac.structures.low_rank_factors import SketchyStructure, SkfacStructure
from bayes_kfac.structures.low_rank_gaussian import LowRankGaussian
from bayes_kfac.structures.low_rank_kron import LowRankKroneckerGaussian
from bayes_kfac.structures.matrix_normal import MatrixNormalGaussian
from bayes_kfac.structures.mkor import MkorStructure
from bayes_kfac.structures.psgd import PSGDStructure
from bayes_kfac.structures.rnn_chain import EndlessChainStructure, SymmetricChainStructure
from bayes_kfac.structures.shampoo import ShampooStructure
from bayes_kfac.structures.tensor_normal import TensorEigenGaussian, TensorNormalGaussian
from bayes_kfac.structures.tkfac import TKFACStructure
from bayes_kfac.structures.tnt import TensorNormalStructure
from bayes_kfac.structures.tridiagonal import TridiagonalStructure
from bayes_kfac.structures.two_kronecker import TwoKroneckerGaussian
from bayes_kfac.structures.unit_wise import UnitWiseGaussian, UnitWiseStructure
from bayes_kfac.structures.whitened import Whitened

__all__ = [
    "DAMPING_KINDS",
    "BlockGaussian",
    "BlockSpec",
    "Card",
    "ChainGaussian",
    "DenseGaussian",
    "DenseStructure",
    "DiagonalGaussian",
    "DiagonalStructure",
    "EKFACStructure",
    "EndlessChainStructure",
    "EvaStructure",
    "FOOFStructure",
    "Information",
    "InverseFreeKFACStructure",
    "InverseFreeStructure",
    "JointGaussian",
    "KBFGSStructure",
    "KFACCorrectedStructure",
    "KPSVDDeflationStructure",
    "KPSVDLanczosStructure",
    "KPSVDStructure",
    "KroneckerEigenGaussian",
    "KroneckerStructure",
    "Link",
    "LowRankGaussian",
    "LowRankKroneckerGaussian",
    "MFacStructure",
    "MatrixNormalGaussian",
    "MkorStructure",
    "PSGDStructure",
    "Prior",
    "ShampooStructure",
    "SketchyStructure",
    "SkfacStructure",
    "SlangStructure",
    "SmwStructure",
    "Structure",
    "StructuredInverseFreeStructure",
    "SymmetricChainStructure",
    "TEKFACStructure",
    "TKFACStructure",
    "TensorEigenGaussian",
    "TensorNormalGaussian",
    "TensorNormalStructure",
    "TongaStructure",
    "TridiagonalStructure",
    "TwoKroneckerGaussian",
    "UnitWiseGaussian",
    "UnitWiseStructure",
    "Whitened",
    "available",
    "build",
    "correlation",
    "gaussian_from_state",
    "get",
    "measure",
    "preconditioners",
    "register",
    "register_gaussian",
    "standard_normal",
]
