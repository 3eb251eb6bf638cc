"""What predictions, and the model, give away of the images of the training."""
