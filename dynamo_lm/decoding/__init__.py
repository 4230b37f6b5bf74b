"""The decoding loop, from exact to fast."""
