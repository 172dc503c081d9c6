"""Real S3 servers on loopback, and the bad network between them and the product, for tests."""
