"""Boards, synthesis, bitstreams and reports."""
