"""What follows from a study alone: its arms and what each is made of."""
