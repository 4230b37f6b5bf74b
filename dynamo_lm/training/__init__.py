"""Training of the heads."""
