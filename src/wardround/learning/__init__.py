"""What a site learns and how: methods, learner, private training."""
