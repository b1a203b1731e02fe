"""A catalog of galaxies to a table of predictions."""

from .galaxies import Predictions, predict_galaxies

__all__ = ["Predictions", "predict_galaxies"]
