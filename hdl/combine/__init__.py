"""Weighted sums of outputs, and their way to memory."""
