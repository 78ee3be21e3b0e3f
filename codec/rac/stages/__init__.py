"""The stages of the format, one place each: parameters, unit, decoding. Nothing in here encodes a model."""
