"""What every script needs and no paper mentions.

The command line, the run folder and its page, pictures, files, checkpoints of models, photos,
the device, the optimizer, and the words that a model knows.
"""
