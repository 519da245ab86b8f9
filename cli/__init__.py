"""The commands of the package.

`vlv caption | reconstruct | encode | evaluate | convert | info | push | demo | serve | estimate | train`.
"""
