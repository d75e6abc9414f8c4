"The Transformer, from the first dot product to a trained translator."

__version__ = "0.1.0"
