"""What the training loop asks of a device, and the answers of each kind of device but the Gaudi."""
