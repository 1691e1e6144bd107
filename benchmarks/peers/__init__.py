"""What we are measured against: other ways to do the same work, written for this comparison, each a program of its own."""
