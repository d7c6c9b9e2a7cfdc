"""Pure functions of matrices: sketches of covariances, their inverse roots, preconditioners made of them."""

from sketch_plugins.linalg.frequent_directions import SOLVERS, TAILS, Covariance, accumulate, drain, fold, start

__all__ = ["SOLVERS", "TAILS", "Covariance", "accumulate", "drain", "fold", "start"]
