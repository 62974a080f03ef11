"""Estimators with scikit-learn's conventions, which this module needs: ``pip install 'loraspan[demo]'``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor

from loraspan.linalg.incremental_svd import IncrementalSVD

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before scikit-learn 1.6 it was a method

    def validate_data(estimator: Any, x: ArrayLike, **options: Any) -> NDArray[np.floating[Any]]:
        """Check rows against those of the fit."""
        return estimator._validate_data(x, **options)  # type: ignore[no-any-return]


Matrix = NDArray[np.floating[Any]]
# Rows that are copied at once where an array cannot be read in place.
_COPIED_ROWS = 1024


# scikit-learn has no types
class IncrementalPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Principal components of rows that keep arriving: ``sklearn.decomposition.IncrementalPCA`` by IncrementalSVD.

    Same attributes, but: blocks may be of any size, and their sizes change nothing; ``n_components`` may exceed what
    has come so far, of which it then gives what there is; and what the components miss is bounded (see
    :class:`loraspan.linalg.IncrementalSVD`, which is at ``svd_``). Attributes are worked out when they are read, so
    that ``partial_fit`` costs nothing but the update. Rows are held in the dtype of the first ones.

    Args:
        n_components: how many; None takes the smaller size of the first block.
        buffer: directions held beyond those; None takes ``n_components``, at least 8.

    Attributes:
        svd_: the IncrementalSVD.
        n_samples_seen_: rows so far.

    Raises:
        ArgumentError: from a fit, if ``n_components`` or ``buffer`` is out of range; it is a ValueError.

    Example:
        >>> import numpy as np
        >>> pca = IncrementalPCA(n_components=1)
        >>> rows = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> pca.partial_fit(rows[:1]).partial_fit(rows[1:]).components_.round(6)
        array([[0.6, 0.8]])
        >>> pca.transform(rows).ravel().round(6)
        array([-5.,  0.,  5.])
    """

    svd_: IncrementalSVD

    def __init__(self, n_components: int | None = None, *, buffer: int | None = None) -> None:
        self.n_components = n_components
        self.buffer = buffer

    def fit(self, X: ArrayLike, y: object = None) -> IncrementalPCA:  # noqa: ARG002 (scikit-learn's signature)
        """Forget everything, and take in the rows ``X [n, D]``."""
        return self._take(X, first=True)

    def partial_fit(self, X: ArrayLike, y: object = None) -> IncrementalPCA:  # noqa: ARG002
        """Take in the rows ``X [n, D]`` as newer ones."""
        return self._take(X, first=not hasattr(self, "svd_"))

    def transform(self, X: ArrayLike) -> Matrix:
        """Give the loadings ``[n, k]`` of the rows ``X [n, D]``, less the mean."""
        check_is_fitted(self)
        x = self._rows(X, first=False)
        return np.concatenate([self.svd_.transform(piece).numpy() for piece in _tensors(x)])

    def inverse_transform(self, X: ArrayLike) -> Matrix:
        """Give the rows ``[n, D]`` that have the loadings ``X [n, k]``."""
        check_is_fitted(self)
        loadings = check_array(X, dtype=[np.float64, np.float32], ensure_min_features=0)
        rows: Matrix = loadings @ self.components_ + self.mean_
        return rows

    @property
    def components_(self) -> Matrix:
        """The components ``[k, D]``, orthonormal, by falling variance."""
        return _array(self.svd_.basis.T)

    @property
    def n_components_(self) -> int:
        """How many there are: ``n_components``, or less while the rows have fewer directions."""
        return len(self.svd_.s)

    @property
    def singular_values_(self) -> Matrix:
        """The singular values ``[k]`` of the rows less their mean."""
        return _array(self.svd_.s)

    @property
    def mean_(self) -> Matrix:
        """The mean of all rows so far, ``[D]``."""
        return _array(self.svd_.mean)

    @property
    def explained_variance_(self) -> Matrix:
        """The variance along each component ``[k]``."""
        return self.singular_values_**2 / max(1, self.n_samples_seen_ - 1)

    @property
    def explained_variance_ratio_(self) -> Matrix:
        """The share ``[k]`` of all variance along each component; never above the true one."""
        energies = self.singular_values_**2
        return energies / (energies.sum() + self.svd_.discarded) if len(energies) else energies

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def _take(self, X: ArrayLike, *, first: bool) -> IncrementalPCA:
        x = self._rows(X, first=first)
        if first:
            count = min(x.shape) if self.n_components is None else self.n_components
            svd = IncrementalSVD(count, buffer=self.buffer, center=True)
        else:
            svd = self.svd_
        for piece in _tensors(x):
            svd.update(piece)
        self.svd_, self.n_samples_seen_ = svd, svd.seen
        return self

    def _rows(self, X: ArrayLike, *, first: bool) -> Matrix:
        x: Matrix = validate_data(self, X, reset=first, dtype=[np.float64, np.float32])
        return x


def _tensors(x: Matrix) -> Iterator[Tensor]:
    """Give the rows where they lie, or block by block as copies where torch does not take them as they are."""
    as_it_is = x.flags.writeable and min(x.strides) >= 0
    step = len(x) if as_it_is else _COPIED_ROWS
    for start in range(0, len(x), step):
        piece = x[start : start + step]
        yield torch.from_numpy(piece if as_it_is else piece.copy())


def _array(tensor: Tensor) -> Matrix:
    """Give a copy, so that nobody writes into what is kept."""
    copy: Matrix = tensor.numpy().copy()
    return copy
