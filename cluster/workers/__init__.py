"""The run's Ray actors: pool.py places them, rollout_fleet.py and learner_group.py keep them
alive.
"""
