"""Data: adapters for users' own pictures, and `scenes`, the small built-in data set with its verifier.

Nothing is imported here, so that each module also runs as a command (`python -m diffusers_ext.data.scenes`).
"""
