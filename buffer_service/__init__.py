"""The hub in Redis: rollout requests, trajectories, prompt statistics, weight versions.

store.py is the door (ReplayBuffer): requests.py for rollout actors, replay.py for the learner,
stats.py for telemetry, control.py for values and heartbeats. records/ what is stored, redis/
how, transfer/ snapshots and exports, weights/ the way of a policy version. Contract: README.md.
"""
