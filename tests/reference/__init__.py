"""Independent check of the numbers: the method in plain transformers, without this package."""
