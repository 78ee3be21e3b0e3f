"""Symbols to words and back: integer frequency tables, ANS lanes."""
