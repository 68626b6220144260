"""AVATAR-RL: reinforcement learning for audio-visual language models, as an actor-learner system.

The folders beside this file are links to the ones at the top of the repository, so that every
import has one root: ``from avatar_rl.learner.objective.loss import policy_loss``. Rooms, from the
ground up; an import goes down, never up or sideways:

    common          errors, files, processes, the client of chat endpoints
    prompts         what is asked: records, dataset readers, media, tokens, the synthetic world
    buffer_service  the hub in Redis: rollout requests, trajectories, statistics, weight versions
    rewards         what a completion is paid: answers, judges, the reward actor
    actors          rollout actors: vLLM generates, completions are scored and stored
    learner         DeepSpeed trains: objective, batches, model, state
    cluster         starts, watches and restarts all of it: recipes, training loop, commands

The way of a prompt: ``cluster.training.prompt_schedule`` makes requests,
``buffer_service.requests`` leases them, ``actors.rollout`` generates, ``rewards.actor`` scores,
``buffer_service.replay`` gives the learner fresh and replayed groups, ``learner.rank`` trains,
``buffer_service.weights`` carries the new version back. Read first: ``cluster/training/loop.py``,
then docs/architecture.md."""

__version__ = "0.2.0"
