"""Training: the one loop behind `fit`, augmentation, batch-norm folding, fused training."""
