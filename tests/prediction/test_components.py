import numpy as np
import pytest

from zoobot_hf.prediction.components import fit_components, read_components, write_components


@pytest.fixture
def embeddings():
    """300 points that vary by 9, 3, 1 and 0.1 along four directions of their own, around 5."""
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    return 5 + generator.normal(size=(300, 4)) * [9, 3, 1, 0.1] @ directions.T


def test_the_components_are_the_eigenvectors_of_the_covariance(embeddings):
    components = fit_components(embeddings, dimensions=2)
    variances, directions = np.linalg.eigh(np.cov(embeddings.T))
    for own, expected in zip(components.directions, directions.T[::-1], strict=False):
        assert abs(own @ expected) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(components.explained, variances[:1:-1] / variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(components.mean, embeddings.mean(axis=0), rtol=1e-6)


def test_reduced_embeddings_keep_their_distances(embeddings):
    reduced = fit_components(embeddings, dimensions=3).reduce(embeddings)
    assert reduced.shape == (300, 3)
    assert reduced.dtype == np.float32
    before, after = (np.linalg.norm(values[0] - values[1:], axis=1) for values in (embeddings, reduced))
    assert np.abs(before - after).max() < 0.1
    np.testing.assert_allclose(reduced.mean(axis=0), 0, atol=1e-5)


def test_components_are_the_same_after_a_round_trip_and_at_every_fit(embeddings, tmp_path):
    components = fit_components(embeddings, dimensions=2)
    write_components(components, tmp_path / "pca.safetensors")
    back = read_components(tmp_path / "pca.safetensors")
    assert back.fingerprint() == components.fingerprint() == fit_components(embeddings, dimensions=2).fingerprint()
    assert fit_components(embeddings[1:], dimensions=2).fingerprint() != components.fingerprint()


@pytest.mark.parametrize("dimensions", [0, 5])
def test_dimensions_that_are_not_there_are_refused(embeddings, dimensions):
    message = f"pca is {dimensions}; 300 galaxies with embeddings of 4 dimensions allow 1 to 4"
    with pytest.raises(ValueError, match=message):
        fit_components(embeddings, dimensions=dimensions)


def test_a_file_that_is_no_pca_is_named(tmp_path):
    path = tmp_path / "pca.safetensors"
    with pytest.raises(ValueError, match=r"pca\.safetensors can't be read as a PCA"):
        read_components(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"can't be read as a PCA"):
        read_components(path)
