"""State that outlives a run.

store.py writes checkpoint folders whole or not at all, for checkpoint.py (a run's) and
sft_checkpoint.py (a cold start's). resume.py finds a run to resume and puts its folder back.
runlock.py keeps two jobs from one run. Read first: checkpoint.py.
"""
