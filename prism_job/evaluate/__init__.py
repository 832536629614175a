"""How good a ranking is: metrics, labels, rivals, audit."""
