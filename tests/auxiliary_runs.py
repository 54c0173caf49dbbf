"""A tiny suite whose defenses have auxiliary models."""

from runs import Json

REDIRECTION, MISINFORMATION = "gradient-redirection", "adaptive-misinformation"


WITH_AUXILIARY: Json = {
    "precision": "fp32",
    "defenses": ["none", "stingy", REDIRECTION, MISINFORMATION],
    "attacks": ["kd", "partial-kd"],
    "baselines": ["hard-label"],
    f"defense.{REDIRECTION}.epochs": 1,
}
