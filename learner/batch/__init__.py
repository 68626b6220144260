"""From trajectories to micro-batches: plan.py splits a step over ranks under a token budget,
microbatch.py lays rows out, each prompt and its media once.
"""
