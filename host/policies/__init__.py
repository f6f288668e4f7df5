"""Policies: which expert is where, what moves when, and what is computed on which side.

A policy is one file in one of four folders, which are registries: ``placement`` (who computes an
expert that was routed to), ``residency`` (what stays in the memory of the torch device),
``prefetch`` (what is moved before it is asked for) and ``routing`` (changes of the routes, all of
them lossy). `systems` makes whole systems of them, `costs` says what everything takes, `replay`
runs a system over a trace and `compare` runs them all.
"""
