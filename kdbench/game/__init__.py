"""The rules: scenarios and the oracle, data, what a defense and an attack are, roles of randomness. Names no method."""
