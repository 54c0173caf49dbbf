"""Evaluation of victims and students: predictions, accuracy, answers, adversarial robustness."""
