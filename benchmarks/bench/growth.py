"""How the cost of a path grows with one quantity: times, and the exponent or the knee."""

CURVES: dict = {}


def measure_growth(names, folder):
    raise SystemExit("not there yet")
