"""What networks, and statistics without one, see in images."""
