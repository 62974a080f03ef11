"""Methods of numerical linear algebra, built from the operators."""

from loraspan.linalg.eig import top_eigenpairs
from loraspan.linalg.factored_svd import factored_svd, merged_svd
from loraspan.linalg.incremental_svd import IncrementalSVD
from loraspan.linalg.incremental_view import Rotation
from loraspan.linalg.randomized_svd import randomized_svd
from loraspan.linalg.roots import gram_root, orthonormalize
from loraspan.linalg.svd import SVD

__all__ = [
    "SVD",
    "IncrementalSVD",
    "Rotation",
    "factored_svd",
    "gram_root",
    "merged_svd",
    "orthonormalize",
    "randomized_svd",
    "top_eigenpairs",
]
