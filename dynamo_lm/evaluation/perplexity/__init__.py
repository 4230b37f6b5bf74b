"""Multi-token perplexities."""
