"""The command line: `vlv caption | reconstruct | encode | train | evaluate`."""
