"""The one training loop: fit, augmentation, folding of batch norms, fused training."""
