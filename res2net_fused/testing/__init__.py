"""What a user needs to check a result: the cases, the comparison with float64, the bounds."""
