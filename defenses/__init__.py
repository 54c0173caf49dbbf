"""Defenses that ship with kdbench: one file a method."""
