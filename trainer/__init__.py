"""The trainer: Algorithm 1, the learner, its objective, checkpoints and reports."""
