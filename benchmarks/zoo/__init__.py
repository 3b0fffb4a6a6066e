"""Does unisono agree with the loop on the models that people use? See ``__main__``."""
