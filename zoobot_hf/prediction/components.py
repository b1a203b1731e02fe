"""Principal components: embeddings in fewer dimensions, fitted once and kept in a file for other embeddings."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from sklearn.decomposition import PCA

from zoobot_hf.data.catalog import whole_file


class Components(NamedTuple):
    """A fitted principal component analysis.

    Attributes:
        mean: (embedding_size,), float32, of the embeddings that it was fitted on.
        directions: (dimensions, embedding_size), float32, orthonormal; the one with the largest variance first.
        explained: (dimensions,), float32: the share of the variance along each direction, 0-1.
    """

    mean: npt.NDArray[np.float32]
    directions: npt.NDArray[np.float32]
    explained: npt.NDArray[np.float32]

    def reduce(self, embeddings: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """The embeddings along the directions, (galaxies, dimensions), in the same order of rows.

        Args:
            embeddings: (galaxies, embedding_size).
        """
        return np.asarray((embeddings.astype(np.float32) - self.mean) @ self.directions.T, dtype=np.float32)

    def fingerprint(self) -> str:
        """A hash of every number."""
        return hashlib.sha256(save(self._asdict())).hexdigest()


def check_dimensions(dimensions: int, *, galaxies: int, size: int) -> None:
    """Checks that principal components can be fitted.

    Args:
        dimensions: How many directions to keep.
        galaxies: How many there are to fit them on.
        size: Dimensions of the embeddings.

    Raises:
        ValueError: More dimensions than galaxies or than the embeddings have, or none.
    """
    if not 0 < dimensions <= min(galaxies, size):
        raise ValueError(
            f"pca is {dimensions}; {galaxies} galaxies with embeddings of {size} dimensions allow 1 to "
            f"{min(galaxies, size)}."
        )


def fit_components(embeddings: npt.NDArray[np.floating[Any]], *, dimensions: int) -> Components:
    """The principal components of embeddings; the same embeddings give the same components.

    Args:
        embeddings: (galaxies, embedding_size).
        dimensions: How many directions to keep.

    Raises:
        ValueError: As in `check_dimensions`.
    """
    check_dimensions(dimensions, galaxies=len(embeddings), size=embeddings.shape[1])
    # Float64, or the variance of many galaxies loses digits; "full", because the others draw or guess.
    fitted = PCA(dimensions, svd_solver="full").fit(embeddings.astype(np.float64))
    parts = (fitted.mean_, fitted.components_, fitted.explained_variance_ratio_)
    return Components(*(np.ascontiguousarray(part, dtype=np.float32) for part in parts))


def write_components(components: Components, path: Path) -> None:
    """Writes components to a safetensors file, whole or not at all.

    Args:
        components: The components.
        path: The file.
    """
    with whole_file(path) as partial:
        partial.write_bytes(save(components._asdict()))


def read_components(path: Path) -> Components:
    """Components from a file.

    Args:
        path: What `write_components` wrote.

    Raises:
        ValueError: The file is missing, damaged or holds something else.
    """
    try:
        return Components(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(
            f"{path} can't be read as a PCA: {' '.join(str(error).split())}. Give the pca.safetensors that zoobot-hf "
            "embed wrote, or its folder."
        ) from error
