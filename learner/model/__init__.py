"""The trainable model: load.py, policy.py (log-probabilities and entropy of a pack, with
attention.py, media.py and head.py below it), check.py (is it the model's own?), reference.py (the
KL term's frozen copy), names.py (ours and those of published checkpoints), export.py (Hugging Face
checkpoints out).
"""
