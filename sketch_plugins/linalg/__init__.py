"""Pure functions of matrices: sketches of covariances, their inverse roots, and preconditioners."""

from sketch_plugins.linalg.frequent_directions import SOLVERS, TAILS, Covariance, drain, fold, sampled, start

__all__ = ["SOLVERS", "TAILS", "Covariance", "drain", "fold", "sampled", "start"]
