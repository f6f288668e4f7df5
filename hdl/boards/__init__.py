"""What stands between the accelerator and a board's pins."""
