"""How good the members of an ensemble are, each by itself and together."""
