"""The synthetic audio-visual world: short clips with exact ground truth (docs/synthetic-world.md).
Start at ``world.synthesize``."""
