"""Tables of predictions for catalogs of galaxies."""
