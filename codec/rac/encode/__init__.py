"""What only a packer needs."""
