"""Methods of numerical linear algebra, built from the operators."""

from loraspan.linalg.eig import top_eigenpairs
from loraspan.linalg.roots import gram_root, orthonormalize
from loraspan.linalg.svd import SVD

__all__ = ["SVD", "gram_root", "orthonormalize", "top_eigenpairs"]
