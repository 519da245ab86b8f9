"""The commands of the package.

`vlv caption | reconstruct | encode | score | evaluate | convert | info | push | demo | serve | estimate | data |
train`.
"""
