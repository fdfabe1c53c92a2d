"""The training engine: from the configuration to runs, their checkpoints and their evaluations.

Its loop (trainer, learner, evaluate, meter, guard) steps any task over any loader and loses nothing; that part knows
nothing of Hydra or of images.
"""
