"""The documents as a site: `mkdocs.yml`, its hooks, and the reference that is made from the code."""
