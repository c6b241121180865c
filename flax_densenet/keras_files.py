"""Placeholder until the branch of Keras files is merged."""


def recognise(path):
    return False
