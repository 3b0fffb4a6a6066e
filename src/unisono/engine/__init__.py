"""How one call runs for all members."""
