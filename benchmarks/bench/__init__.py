"""Each path of the library beside the authors' method and beside its bare modules: `python -m benchmarks.bench`.

`models.py` builds the models and files of three sizes, `original.py` has the authors' method, and `paths.py` the ways
that are compared. `measure.py` runs them in turns, `growth.py` varies one quantity at a time, and `report.py` writes the
tables. `profile.py` is a command of its own: where the time of a path goes.
"""
