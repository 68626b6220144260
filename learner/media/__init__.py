"""Media ahead of the step: frozen towers run once per medium, and the learner takes embeddings.

choice.py says whether they can, store.py keeps them on the node's disk, towers.py runs the towers,
encoder.py turns prompts into tokens and embeddings, workers.py does so in other processes, and
ahead.py tells these which prompts come next. Where towers train, pixels.py keeps pixels instead.
Read first: ``StoredEncoder`` in encoder.py."""
