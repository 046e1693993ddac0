"""How the catalogue's tables came to be what they are: an Alembic environment that travels with the package."""
