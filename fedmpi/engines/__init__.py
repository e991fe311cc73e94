"""Ways to take the steps of local SGD; they differ in speed, not in what they compute."""
