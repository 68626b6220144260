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

This is the board. Joiners, adapters and whatever cannot use another road take it. The other road
(``weights.transport``) goes to all engine workers at once:

    learner rank 0                        Redis (news.py)              a worker of vLLM
    road_sender.py: who is there?  ─────▶ Call, answers ◀───────────── member.py, a thread
      transfer_client.py: meet     ─────▶ Form, an epoch ────────────▶ links.py: join the group
      send, part by part           ─────▶ Send ──────────────────────▶ staging.py: host memory
             └───────── broadcast by NCCL, gloo or CUDA IPC ─────────────▲
      all is out                   ─────▶ Sent, checksums ───────────▶ checked by WeightContract
      seal: version, token, who    ─────▶ Sealed                         staged
      commit_step, as above        ─────▶ version ───────────────────▶ road_receiver.py hands it on

Nothing of a version touches an engine before it is whole, checked, sealed and committed. A token
tells two tries at one version apart. What fails costs one new group; what fails twice takes the
board.

Read first: store.py, which holds the message and the relay between the two sides, then
road_sender.py. block.py is the memory of one version: filled once, one checksum, one buffer for
Ray; vllm_links.py has the sender's ends of vLLM's own engines.
"""
