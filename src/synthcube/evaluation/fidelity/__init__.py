"""How near predictions are to real images, and how varied."""
