"""Named methods of the literature, in the same file format: transforms, rotations, GPTQ, SmoothQuant."""
