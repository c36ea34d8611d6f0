"""The bundled models: scenes, vision and language training, prompts, and their weights.

May import model.train and everything below it.
"""
