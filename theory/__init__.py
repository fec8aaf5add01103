"""What the theory says: label-noise SDEs, the laws they imply, and the vocabulary that runs share with them.

Nothing here imports from ``simulators``, ``nets`` or ``validation``.
"""
