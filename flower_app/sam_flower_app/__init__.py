"""SAM-v2 as a Flower app."""
