"""One run from recipe to report.

run.py sets up and takes down, loop.py is the training loop, supervisor.py looks after the rest
meanwhile, restarts.py runs a recipe through all its lives; evaluation and cold start beside.
"""
