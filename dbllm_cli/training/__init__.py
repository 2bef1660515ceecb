"""What trains: layers, optimizer, losses, and the trainer of distill."""
