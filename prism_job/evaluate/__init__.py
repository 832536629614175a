"""How good a ranking is: metrics, labels, baselines, audit."""
