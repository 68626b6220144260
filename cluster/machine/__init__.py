"""A recipe held against the machine that it is written for. `avatar train --dry-run`, `avatar
doctor` and the start of a run ask here; the arithmetic is recipe/memory.py's."""
