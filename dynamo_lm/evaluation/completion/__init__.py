"""The sentence-completion protocol."""
