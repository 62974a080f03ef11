"""Methods of numerical linear algebra, built from the operators."""

from loraspan.linalg.eig import top_eigenpairs
from loraspan.linalg.roots import gram_root, orthonormalize

__all__ = ["gram_root", "orthonormalize", "top_eigenpairs"]
