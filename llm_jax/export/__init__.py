"""Trained models for other programs; one file per format, found by name."""
