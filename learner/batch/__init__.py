"""From trajectories to micro-batches: plan.py collects a step from the buffer and splits it over
ranks under a token budget, microbatch.py lays rows out, each prompt and its media once.
"""
