"""Ensembles on disk: safetensors, written whole or not at all, read without running anything."""
