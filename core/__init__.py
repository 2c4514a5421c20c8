"""Nouns and arithmetic of S2L-PO. Starts in milliseconds: no torch, no sockets."""
