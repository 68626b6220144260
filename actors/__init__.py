"""Rollout actors: each leases prompts, generates, has the completions scored and inserts groups.

rollout.py is the actor and starts the threads: feeder.py leases and prepares prompts, generation.py
drives the engine, scoring_loop.py delivers finished groups. prompt_workers.py has the processes
that prepare media for the feeder. groups.py says what a group is on its way, shared_state.py what
the threads share, update_policy.py when new weights are taken in, gathering.py when the engine
waits for prompts, engine_turn.py when it sleeps for the learner. engine/ is vLLM. Nobody calls an
actor while it runs. Read first: shared_state.py, generation.py.
"""
