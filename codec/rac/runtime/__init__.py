"""Models that run from archives."""
