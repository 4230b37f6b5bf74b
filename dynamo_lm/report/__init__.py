"""Results in, one page and figures out."""
