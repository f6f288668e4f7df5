"""Commands, registers and counters: what the host sees."""
