"""The report page: one HTML file over a registry or a build that needs no network. Importing it loads nothing heavy."""
