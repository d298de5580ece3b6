"""What a checkpoint is: config, tensors, files, fingerprint."""
