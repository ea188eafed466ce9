"""Names of models and data sets of the hub in, checked files and ranges of them out."""
