"""Allocate: the common scale at which a model meets a budget."""
