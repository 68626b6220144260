"""Pure tensor functions: advantages, temporal shaping, the policy loss, and the metrics of a step.
Read in this order beside docs/method.md, section 1.
"""
