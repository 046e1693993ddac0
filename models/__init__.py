"""What both the node and the trainer know of models; imports nothing."""
