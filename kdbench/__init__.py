"""kdbench: who steals what from whom by knowledge distillation, measured fairly."""

__version__ = "0.1.0"
