"""The estimator keeps scikit-learn's conventions and gives what scikit-learn's own give."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from loraspan.compat.sklearn import IncrementalPCA


# scikit-learn skips its array API check by itself unless SCIPY_ARRAY_API is set
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([IncrementalPCA(n_components=2), IncrementalPCA(), IncrementalPCA(n_components=3, buffer=0)])
def test_keeps_the_conventions(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    return load_digits().data


@pytest.mark.parametrize(("dtype", "near"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_gives_what_pca_gives(digits, dtype, near):
    """64 columns and 10 + 54 directions held: nothing is cut."""
    x = digits.astype(dtype)
    exact = PCA(n_components=10, svd_solver="full").fit(digits)
    ours = IncrementalPCA(n_components=10, buffer=54)
    for start in range(0, len(x), 100):
        ours.partial_fit(x[start : start + 100])
    assert ours.n_samples_seen_ == len(x)
    assert ours.n_components_ == 10
    assert ours.components_.dtype == dtype
    for name in ("singular_values_", "mean_", "explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(exact, name), rtol=near, atol=near)
    # vectors up to their signs
    overlap = np.abs(np.sum(ours.components_ * exact.components_, axis=1))
    np.testing.assert_allclose(overlap, 1, atol=near)
    loadings, theirs = ours.transform(x), exact.transform(digits)
    np.testing.assert_allclose(np.abs(loadings), np.abs(theirs), atol=1e3 * near)
    rebuilt, best = ours.inverse_transform(loadings), exact.inverse_transform(theirs)
    np.testing.assert_allclose(rebuilt, best, atol=1e3 * near)


def test_the_default_buffer_is_nearly_as_good(digits):
    exact, ours = PCA(n_components=10).fit(digits), IncrementalPCA(n_components=10).fit(digits)
    assert np.linalg.norm(digits - ours.inverse_transform(ours.transform(digits))) <= (1 + 1e-3) * np.linalg.norm(
        digits - exact.inverse_transform(exact.transform(digits))
    )
    assert (ours.explained_variance_ratio_ <= exact.explained_variance_ratio_ * (1 + 1e-9)).all()


def test_fit_forgets_and_block_sizes_do_not_matter(digits):
    whole = IncrementalPCA(n_components=5).fit(digits[:50]).fit(digits)
    pieces = IncrementalPCA(n_components=5)
    for row in digits[:300]:
        pieces.partial_fit(row[None])
    pieces.partial_fit(digits[300:])
    assert whole.n_samples_seen_ == pieces.n_samples_seen_ == len(digits)
    np.testing.assert_array_equal(whole.components_, pieces.components_)


@pytest.mark.parametrize("change", [np.asfortranarray, lambda x: x[::-1][::-1], lambda x: x[:, ::-1][:, ::-1], bytes])
def test_arrays_of_any_storage(digits, change):
    x = np.frombuffer(digits.tobytes()).reshape(digits.shape) if change is bytes else change(digits)
    np.testing.assert_array_equal(
        IncrementalPCA(n_components=3).fit(x).components_, IncrementalPCA(n_components=3).fit(digits).components_
    )
    backwards = IncrementalPCA(n_components=3).fit(digits)
    np.testing.assert_array_equal(backwards.transform(digits[::-1]), backwards.transform(digits)[::-1])


def test_more_components_than_rows_gives_what_there_is(digits):
    pca = IncrementalPCA(n_components=8).partial_fit(digits[:3])
    assert pca.components_.shape == (2, 64)
    assert pca.transform(digits[:5]).shape == (5, 2)
    assert pca.partial_fit(digits[3:]).components_.shape == (8, 64)


def test_a_constant_has_no_components():
    pca = IncrementalPCA(n_components=2).fit(np.full((9, 4), 3.0))
    assert pca.components_.shape == (0, 4)
    assert pca.explained_variance_ratio_.shape == (0,)
    np.testing.assert_array_equal(pca.inverse_transform(pca.transform(np.ones((2, 4)))), np.full((2, 4), 3.0))


def test_goes_into_pipelines_clones_and_pickles(digits):
    pipeline = make_pipeline(StandardScaler(), IncrementalPCA(n_components=4, buffer=6)).fit(digits)
    copied = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(copied.transform(digits), pipeline.transform(digits))
    assert list(pipeline.get_feature_names_out()) == [f"incrementalpca{i}" for i in range(4)]
    fresh = clone(pipeline[-1])
    assert fresh.get_params() == {"n_components": 4, "buffer": 6}
    with pytest.raises(NotFittedError):
        fresh.transform(digits)


def test_attributes_are_copies(digits):
    pca = IncrementalPCA(n_components=4).fit(digits)
    for name in ("components_", "singular_values_", "mean_"):
        before = getattr(pca, name).copy()
        getattr(pca, name)[:] = 0
        np.testing.assert_array_equal(getattr(pca, name), before)


@pytest.mark.parametrize("options", [{"n_components": 0}, {"n_components": 2.5}, {"n_components": 2, "buffer": -1}])
def test_bad_options_are_refused_when_fitted(digits, options):
    with pytest.raises(ValueError, match="IncrementalSVD"):
        IncrementalPCA(**options).fit(digits)
