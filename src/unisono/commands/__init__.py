"""What the commands of the terminal program do; ``unisono.cli`` is the door."""
