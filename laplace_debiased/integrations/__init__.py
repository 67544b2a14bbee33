"""Posteriors where people already train: callbacks of other libraries' trainers.

None of them is needed otherwise, and each module imports its own library.
"""
