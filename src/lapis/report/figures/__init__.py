"""Plain rows in, plotly figures out: one function for each picture."""
