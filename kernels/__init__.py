"""Fused log-prob and policy-loss kernels, and their plain specification. Imports nothing."""

# transformers reads this when it probes for Hugging Face's package of the same name.
__version__ = "0.0.0"
