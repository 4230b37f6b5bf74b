"""Text and conversations in, packed blocks of tokens out."""
