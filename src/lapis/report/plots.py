"""Every picture of lapis, by name: plain rows (lists of dicts) in, a plotly figure out.

    learning_curves, metric_panels                                  curves.py
    scores, scale_sweep, growth, mixers                             scores.py
    plan_stack, plan_scatter                                        plan.py
    layer_heatmap, spectra, tensor_errors, parameter_treemap        weights.py
    embedding_rows                                                  embedding.py
    lens_grid, rank_trajectories, attention_map, contributions      forward_pass.py
    matrix                                                          matrix.py
    fertility_curve                                                 fertility.py

Each takes the rows and a title that states the finding, and says in its docstring what a row holds. A figure shows
itself in a notebook; Page.figure puts it on a page. A figure made elsewhere with plotly fits on a page as well.
"""

from lapis.report.figures.curves import learning_curves, metric_panels
from lapis.report.figures.embedding import embedding_rows
from lapis.report.figures.fertility import fertility_curve
from lapis.report.figures.forward_pass import attention_map, contributions, lens_grid, rank_trajectories
from lapis.report.figures.matrix import matrix
from lapis.report.figures.plan import plan_scatter, plan_stack
from lapis.report.figures.scores import growth, mixers, scale_sweep, scores
from lapis.report.figures.weights import layer_heatmap, parameter_treemap, spectra, tensor_errors

__all__ = [
    "attention_map",
    "contributions",
    "embedding_rows",
    "fertility_curve",
    "growth",
    "layer_heatmap",
    "learning_curves",
    "lens_grid",
    "matrix",
    "metric_panels",
    "mixers",
    "parameter_treemap",
    "plan_scatter",
    "plan_stack",
    "rank_trajectories",
    "scale_sweep",
    "scores",
    "spectra",
    "tensor_errors",
]
