"""What a role shows of itself: counters that it keeps, figures of the catalogue, and three pages that tell them."""
