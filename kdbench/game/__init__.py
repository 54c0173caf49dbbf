"""The rules of the game: threat models, methods, training, and the referee. Knows no method by name."""
