"""The paper's experiments: trainings compared on the same answers, and its tables and figures repeated."""
