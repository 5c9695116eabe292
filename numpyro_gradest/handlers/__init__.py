"""Layer 3: handlers that change how a sample site behaves."""

from numpyro_gradest.handlers.configure_estimators import configure_estimators
from numpyro_gradest.handlers.imle import adapt_imle, imle

__all__ = ["adapt_imle", "configure_estimators", "imle"]
