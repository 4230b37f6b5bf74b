"""One file per question asked of a model; `record.py` is how an answer is kept."""
