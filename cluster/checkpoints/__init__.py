"""State that outlives a run: checkpoints, going on from them, and the lock that keeps two jobs
apart.
"""
