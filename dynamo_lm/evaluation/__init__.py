"""Measurements of a model, and the choice of its settings by them; `results_file.py` keeps the results."""
