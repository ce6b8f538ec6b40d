"""What lies on the disk: checkpoints, their means, how a run was made, other people's weights."""
