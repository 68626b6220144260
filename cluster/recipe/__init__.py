"""From YAML, presets and overrides to a checked RunConfig, and what it needs: resources, memory by
arithmetic, datasets and models on disk.
"""
