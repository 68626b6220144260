"""From trajectories to packs: plan.py collects a step from the buffer, packing.py splits it into
packs under a token budget and over ranks, microbatch.py lays a pack out, each prompt and its media
once.
"""
