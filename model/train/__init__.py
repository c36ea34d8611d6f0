"""Train drafts for any target: data, capture of hidden states, losses, the training loop.

May import model.engine and everything below it.
"""
