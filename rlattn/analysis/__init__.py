"""`rlattn analyze`: what attention says about a model's responses, analysis by analysis, and how it is shown.

`measure` turns a model and responses into per-response arrays; `couplings`, `alignment`, `heads`, `perturbation` are
pure functions of those; `maps` rebuilds two attention maps for display; `plots` and `page` draw.
"""
