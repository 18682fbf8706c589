"""What the two papers show and claim, as data: places, claims, and our measurements of them."""
