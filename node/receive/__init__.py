"""The door in: association, pseudonymisation, intake."""
