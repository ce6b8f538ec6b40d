"""What moves the weights: optimizers, schedules, gradients, running averages."""
