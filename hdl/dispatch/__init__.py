"""Which tokens go to which expert, and in which order the array works."""
