"""The frozen stage, the unfrozen stage, and one after the other."""
