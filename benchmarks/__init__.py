"""What unisono is measured on and checked on, outside the tests: ``predict.py`` and ``zoo/``."""
