"""Integrators for the SDEs of ``theory``: own fixed-step schemes and torchsde behind one signature."""
