"""The synthetic audio-visual world: short clips with exact ground truth (DESIGN 5). Start at
``world.synthesize``."""
