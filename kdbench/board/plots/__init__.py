"""The plots of a results folder."""
