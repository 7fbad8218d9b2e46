"""Cascades: routes that answer the images they are sure of, and pass the others on."""
