"""Split: a matrix into a part of low rank, or a basis, and a quantised residual."""
