"""The processes that do one piece of work: how they start, what they share, and what stops them."""
