"""What a classifier learns from predictions."""
