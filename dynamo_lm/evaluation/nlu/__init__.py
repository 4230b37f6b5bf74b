"""Understanding benchmarks through lm-evaluation-harness."""
