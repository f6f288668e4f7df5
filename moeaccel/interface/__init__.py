"""What host and device agree on: registers, commands, the link; generated files."""
