"""Studies: files against their original, methods against each other, bases of a model."""
