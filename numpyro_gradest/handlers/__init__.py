"""Layer 3: handlers that change how a sample site behaves."""

from numpyro_gradest.handlers.imle import adapt_imle, imle

__all__ = ["adapt_imle", "imle"]
