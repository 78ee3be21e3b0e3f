"""Matrix decompositions that alignments and splits use: triangular, principal, low-rank, Hadamard."""
