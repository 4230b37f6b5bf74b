"""Compiled CPU kernels, and the layers that call them."""
