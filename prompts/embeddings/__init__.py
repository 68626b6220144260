"""What frozen towers made of media: names and the store on the node's disk. The learner fills it
(learner/media/), rollouts read it. Start at names.py.
"""
