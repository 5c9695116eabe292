"""Layer 3: handlers that change how a sample site behaves."""

from pyro_gradest.handlers.configure_estimators import configure_estimators
from pyro_gradest.handlers.imle import imle

__all__ = ["configure_estimators", "imle"]
