"""A small world of emoji scenes, and the recipe that trains a complete VLV in it from random weights.

The recipe runs on two CPU cores in a few hours.
"""
