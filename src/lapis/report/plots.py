"""Every picture of lapis, by name: plain rows (lists of dicts) in, a plotly figure out.

    learning_curves, scale_sweep, scores, plan_scatter, mixers    training.py
    layer_heatmap, spectra, tensor_errors, parameter_treemap      weights.py
    embedding_rows                                                embedding.py
    lens_grid, rank_trajectories, attention_map                   inside.py
    contributions                                                 contributions.py
    matrix                                                        matrix.py
    metric_panels                                                 runs.py

Each takes the rows and a title that states the finding, and says in its docstring what a row holds. A figure shows
itself in a notebook; Page.figure puts it on a page. A figure made elsewhere with plotly fits on a page as well.
"""

from lapis.report.figures.contributions import contributions
from lapis.report.figures.embedding import embedding_rows
from lapis.report.figures.inside import attention_map, lens_grid, rank_trajectories
from lapis.report.figures.matrix import matrix
from lapis.report.figures.training import learning_curves, mixers, plan_scatter, scale_sweep, scores
from lapis.report.figures.weights import layer_heatmap, parameter_treemap, spectra, tensor_errors
from lapis.report.working_folder.runs import metric_panels

__all__ = [
    "attention_map",
    "contributions",
    "embedding_rows",
    "layer_heatmap",
    "learning_curves",
    "lens_grid",
    "matrix",
    "metric_panels",
    "mixers",
    "parameter_treemap",
    "plan_scatter",
    "rank_trajectories",
    "scale_sweep",
    "scores",
    "spectra",
    "tensor_errors",
]
