"""Studies: files against their original, methods against each other, bases of a model."""

import re


def role(name: str) -> str:
    """The name of a tensor with the numbers of layers and experts left out."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
