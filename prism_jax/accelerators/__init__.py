"""Machines that are not here: what their compilers make of a run's programs."""
