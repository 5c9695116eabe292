"""Layer 3: handlers that change how a sample site behaves."""

from pyro_gradest.handlers.imle import imle

__all__ = ["imle"]
