"""Records to dense tensors."""
