"""The Zero-Token Transformer: cycles over the middle layers, a zero token for each, early exit."""
