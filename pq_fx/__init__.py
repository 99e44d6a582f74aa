"""pq_fx."""
