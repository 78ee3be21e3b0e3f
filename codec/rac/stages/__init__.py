"""The stages of the format, one place each: parameters, unit, reference decoding. Nothing in here encodes a model."""
