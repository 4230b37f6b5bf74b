"""What the package knows of transformers' models."""
