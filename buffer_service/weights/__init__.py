"""The way of a policy version from the learner to rollout actors.

    learner rank 0            weight store (an actor)         rollout actor
    sender.py: fill a block,  store.py: holds the newest two  receiver.py: waits, verifies,
    hand a message over  ──▶  versions as references  ──────▶ waits for the commit in Redis

The states of one version:

    filled    WeightSender.publish    copied, cast and checksummed in a block of rank 0
      │
    offered   Outbox.put              the store's standing call returns with it
      │
    kept      WeightStore             one reference; version - 2 is dropped, its memory freed
      │
    verified  WeightReceiver.fetch    size and checksum; damaged or lost: asked for again
      │
    committed replay.commit_step      rank 0, in Redis, right after it published
      │                               never committed (its learner died): asked for again
    handed on WeightReceiver.updates  checked by WeightContract, then loaded into the engine

Read first: store.py, which holds the message and the relay between the two sides; block.py is the
memory of one version: filled once, one checksum, one buffer for Ray.
"""
