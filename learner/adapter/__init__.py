"""LoRA: a small adapter is trained beside frozen base weights, by PEFT's layers.

targets.py chooses the layers, lora.py puts the adapter into a model and merges it, base.py records
which model it belongs to, files.py is PEFT's layout on disk. The recipe's section is
learner/lora_config.py.
Read first: ``Adapter`` in lora.py.
"""
