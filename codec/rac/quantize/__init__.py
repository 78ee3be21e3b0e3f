"""Weights to symbols and raw bits, and back."""
