"""Policies: which expert is where, and what moves when."""
