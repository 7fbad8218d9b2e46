"""Images: where they come from, in which order, how they are split, transformed and made into batches."""
