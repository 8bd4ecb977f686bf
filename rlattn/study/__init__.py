"""Studies: a grid of arms and seeds through the ordinary trainer, summed up in a table and curves."""
