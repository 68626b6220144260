"""The trainable model: load.py, names.py (ours and those of published checkpoints), policy.py
(log-probabilities and entropy), reference.py (the KL term's frozen copy), export.py (Hugging Face
checkpoints out).
"""
