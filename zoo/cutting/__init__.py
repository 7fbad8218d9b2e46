"""Cuts any network into stem, blocks and head: records it, finds its seams, chooses blocks, builds modules."""
