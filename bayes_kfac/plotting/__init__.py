"""Pictures of predictions, of posteriors and of learning.

Each function draws on the axes it is given, or on those of a new figure, and returns them for further changes; nothing
is shown, and no global style is read or set beyond Matplotlib's own defaults. Curves are added to axes by calling a
function again. Matplotlib itself is optional and imported on first use: ``pip install 'bayes-kfac[plot]'``.
"""

from bayes_kfac.plotting.classification import plot_reliability, plot_risk_coverage
from bayes_kfac.plotting.learning import plot_acquisition, plot_elbo, plot_learning_curve
from bayes_kfac.plotting.posterior import plot_factor_spectra, plot_layer_summary, plot_precision_spectrum
from bayes_kfac.plotting.regression import plot_coverage, plot_pit, plot_predictive_band

__all__ = [
    "plot_acquisition",
    "plot_coverage",
    "plot_elbo",
    "plot_factor_spectra",
    "plot_layer_summary",
    "plot_learning_curve",
    "plot_pit",
    "plot_precision_spectrum",
    "plot_predictive_band",
    "plot_reliability",
    "plot_risk_coverage",
]
