"""Matrix decompositions and numbers that are the same on every machine: triangular, Hadamard, logarithms."""
