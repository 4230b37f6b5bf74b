"""Algorithm 1 and drafting: pure functions of candidates and tables."""
