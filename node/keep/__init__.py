"""The storeroom."""
