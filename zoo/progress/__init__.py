"""Reports of progress, and how they are shown. Nothing here decides anything."""
