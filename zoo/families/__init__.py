"""Families: their files, and their anchors as chains with weights."""
