"""Rollout actors: each leases prompts, generates, has the completions scored and inserts groups.

rollout.py is the actor, engine/ is vLLM, scoring_loop.py delivers finished groups, update_policy.py
decides when new weights are taken in. Called by nobody while they run. Read first: rollout.py.
"""
