"""The networks that are timed, with the layer shapes under which they were published."""
