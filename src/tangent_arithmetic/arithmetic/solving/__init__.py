"""Coefficients of task vectors, solved for instead of swept: groups, reductions, solvers."""
