"""Grids of runs: what is varied, the processes that run it, the bounds it must keep."""
