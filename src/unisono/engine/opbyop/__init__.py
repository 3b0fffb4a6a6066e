"""The second attempt at a call: only the ops that fail run for one member after another."""
