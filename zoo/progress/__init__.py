"""Who is told how work goes, and how it is shown. Nothing here decides anything."""
