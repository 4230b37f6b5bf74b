"""All that is known of transformers' internals."""
