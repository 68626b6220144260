"""LoRA: a small adapter is trained beside frozen base weights, by PEFT's layers.

config.py is the section of a recipe. Read first: config.py.
"""
