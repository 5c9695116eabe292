"""Layer 3: whether a fit can be trusted."""

from pyro_gradest.diagnostics.implicit_fit import check_implicit_fit
from pyro_gradest.diagnostics.implicit_report import ImplicitFitReport, ImplicitSitesCheck

__all__ = ["ImplicitFitReport", "ImplicitSitesCheck", "check_implicit_fit"]
