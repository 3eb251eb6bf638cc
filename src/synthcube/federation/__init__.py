"""Training together: what sites agree on, what they send, and how it is averaged. No network."""
