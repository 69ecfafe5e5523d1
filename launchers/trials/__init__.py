"""What benches and fault tests share."""
