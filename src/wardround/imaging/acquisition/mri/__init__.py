"""MRI: Cartesian sampling with coils."""
