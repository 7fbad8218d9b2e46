"""Tuning a supernet, and how accurate its routes are afterwards."""
