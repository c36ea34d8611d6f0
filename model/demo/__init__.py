"""Build the bundled models: scenes, vision and language training, prompts, and the models' weights.

May import model.train and everything below it.
"""
