"""A tiny suite whose attack uses surrogate data."""

from runs import ONE_CELL, Json

PHOTOS = 20_000


WITH_SURROGATES: Json = {**ONE_CELL, "attacks": ["knockoff"], "attack.knockoff.queries": 64}
