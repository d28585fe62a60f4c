"""Training: judges, tournaments, quadruples, losses and the trainer."""
