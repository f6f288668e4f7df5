"""Multipliers, trees, and how results leave them."""
