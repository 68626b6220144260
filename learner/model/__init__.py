"""The trainable model: load.py and sharded_load.py, policy.py (log-probabilities and entropy of a
pack, with attention.py, media.py and head.py below it; sequence.py where ranks share it), check.py
(is it the model's own? stand_in.py is tried for it), reference.py (the KL term's frozen copy),
names.py (the map to the published checkpoint and back), router.py (of mixtures of experts),
export.py (Hugging Face checkpoints out).
"""
