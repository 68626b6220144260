"""The way of a policy version from the learner to rollout actors.

    learner rank 0            weight store (an actor)         rollout actor
    sender.py: fill a block,  store.py: holds the newest two  receiver.py: waits, verifies,
    hand a message over  ──▶  versions as references  ──────▶ waits for the commit in Redis

block.py is the memory of one version: filled once, one checksum, one buffer for Ray. A version
counts once its number is committed in Redis (replay.py); an announced version that never is
committed is thrown away.
"""
