"""The benchmark: times of correct ops against the floor and against other implementations."""
