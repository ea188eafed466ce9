"""Pictures and pages: plain rows in, a plotly figure or one self-contained HTML file out.

plots.py        rows -> figure, one function per picture
page.py         figures, tables, text and replies -> one HTML string that works offline
theme.py        the colors, fonts and axes that all of them share
evaluations.py  the kinds of evaluation and their figures, by name, unit and direction

Nothing here knows of models or tensors, and plotly is imported when the first figure is made, not before.
"""

from lapis.report.markup import Column
from lapis.report.page import Page

__all__ = ["Column", "Page"]
