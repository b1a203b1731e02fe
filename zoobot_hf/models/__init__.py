"""Encoders, heads and the image processor that belongs to them."""
