"""Everything that is to be measured on a GPU, as rows that run one after the other within a time limit.

`rows.py` lists them, in order of value; `correctness.py`, `training.py`, `sampling.py`, `profile.py` and `loading.py`
compute them; `runner.py` runs them in a worker process; `tables.py` writes the documents.
"""
